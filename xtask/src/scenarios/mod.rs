//! What has to hold in the virtual machine, on real processes: one function each.

mod access;
mod activity;
mod admission;
mod boot;
mod broken;
mod container;
mod daemon;
mod faults;
mod fit;
mod leases;
mod lifecycle;
mod package;
pub mod pressure;
mod sharing;
mod swap;
mod systemd;

use crate::lab::Lab;
use anyhow::Result;

/// One thing that has to hold.
pub struct Scenario {
    /// What `--only` matches and the report shows.
    pub name: &'static str,
    /// Shows it, or fails with what it saw.
    pub run: fn(&mut Lab) -> Result<()>,
}

macro_rules! scenarios {
    ($($module:ident :: $name:ident),* $(,)?) => {
        /// All scenarios, in the order in which they share the guest.
        pub const ALL: &[Scenario] =
            &[$(Scenario { name: concat!(stringify!($module), "::", stringify!($name)), run: $module::$name }),*];
    };
}

scenarios![
    package::installs_in_good_order,
    admission::two_models_answer,
    admission::higher_priority_makes_room,
    admission::impossible_is_refused,
    admission::ten_at_once,
    broken::missing_and_half_shards,
    broken::closed_directory,
    broken::port_taken,
    broken::hostile_headers,
    fit::predictions_hold,
    fit::second_opinion_is_asked,
    fit::a_peak_is_remembered,
    fit::doctor_finds_nothing_to_fix,
    sharing::mapped_weights_are_charged_once,
    sharing::unmapped_weights_are_charged_twice,
    lifecycle::load_and_unload,
    lifecycle::crash_restarts_through_the_gate,
    lifecycle::evicted_models_return,
    lifecycle::context_shrinks_before_eviction,
    lifecycle::one_larger_than_memory_streams,
    lifecycle::other_engines_and_observing,
    leases::makes_room_and_ends_with_its_command,
    leases::outlives_the_daemon,
    leases::not_for_strangers,
    leases::decisions_are_in_the_journal,
    activity::a_ttl_ends_no_request,
    activity::idle_goes_before_busy,
    activity::requests_end_before_the_stop,
    activity::an_adopted_service_goes_and_returns,
    swap::made_by_hand,
    swap::one_larger_than_memory_swaps,
    swap::a_disk_that_takes_none,
    swap::one_that_has_no_room_to_come_back_stays,
    faults::the_daemon_is_killed_at_each_step,
    faults::the_model_is_killed_while_it_loads,
    faults::the_disk_fails_while_it_loads,
    access::group_members_may_load,
    access::engine_is_unprivileged,
    access::secrets_stay_secret,
    daemon::killed_while_models_run_and_load,
    daemon::start_waits_for_the_daemon,
    daemon::upgrade_keeps_models,
    systemd::its_parts_work,
    systemd::the_daemons_sandbox_holds,
    boot::rivals_and_impossible_at_boot,
    boot::power_fails,
    faults::the_power_fails_in_the_middle,
    faults::a_reboot_in_the_middle,
    boot::a_late_mount_starts_its_models,
    package::installs_without_a_package,
    package::purge_keeps_models,
];

/// Run only when they are named: they have not passed often enough yet to hold up a landing.
pub const NAMED: &[Scenario] = &[
    Scenario { name: "pressure::an_eater_makes_the_lowest_go", run: pressure::an_eater_makes_the_lowest_go },
    Scenario { name: "pressure::a_stubborn_one_is_killed", run: pressure::a_stubborn_one_is_killed },
    Scenario { name: "pressure::load_that_fits_evicts_nobody", run: pressure::load_that_fits_evicts_nobody },
    Scenario { name: "pressure::the_last_rung_stands_in", run: pressure::the_last_rung_stands_in },
    Scenario { name: "pressure::nothing_holds_up_the_loop", run: pressure::nothing_holds_up_the_loop },
    Scenario { name: "container::runs_in_its_unit", run: container::runs_in_its_unit },
    Scenario { name: "container::ends_and_gives_way", run: container::ends_and_gives_way },
    Scenario { name: "container::escapes_are_refused", run: container::escapes_are_refused },
];
