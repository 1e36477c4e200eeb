//! Mistakes that the simulation must find: each breaks one rule of the cluster.

/// One broken rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A report counts although the sandbox's ownership has been given out again since.
    StaleReportCounts,
    /// A lease counts from when its grant arrived.
    LeaseCountedFromReceipt,
    /// The leader adds no margin, and shims freeze only when the lease is over.
    NoMargins,
    /// A new leader takes everybody's lease for as old as the cluster.
    NewLeaderDoesNotWait,
    /// A leader grants renewals without asking a quorum whether it still leads.
    GrantsWithoutQuorum,
    /// A leader grants renewals of nodes that count as missing or lost.
    GrantsToTheMissing,
    /// A node renews under an incarnation that it has been given but has not applied yet.
    GrantCountsBeforeCaughtUp,
    /// Shims do not look at the lease.
    ShimIgnoresLease,
    /// A sandbox that the cluster may start elsewhere runs without being bound to the lease.
    RestartableRunsUnbound,
    /// The only voter keeps its unlimited lease as others join it.
    SoleVoterStaysUnlimited,
    /// Placement does not count what sandboxes take.
    ReservationsIgnored,
    /// A create that is tried again is a new one.
    CreateNotIdempotent,
    /// A write is acknowledged when the leader has it, before it is committed.
    AcknowledgedBeforeCommit,
    /// A new set of voters alone decides on itself, and no quorum is asked for it.
    DemotesBelowQuorum,
    /// A sealed guest goes on when the report of its seal is not answered at once.
    ThawsBeforeTheClusterKnows,
    /// A snapshot goes with the rest of its sandbox, whoever else needs it.
    SnapshotGoesWithItsSandbox,
    /// A guest that starts from another one's snapshot goes on as that one.
    ForkKeepsItsOriginsName,
    /// A fork runs under the ownership of what it comes from.
    ForkTakesItsOriginsEpoch,
    /// A guest begins before the cluster has let it.
    BeginsUnasked,
    /// What was let begin is given out again as if it had not been.
    BegunIsGivenOut,
    /// A node that lost its disk votes under its old id.
    WipedDiskVotes,
}
