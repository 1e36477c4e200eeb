//! Joins the API to the cluster room: who leads, how busy nodes are, how a join token is spelled.

use std::collections::BTreeSet;

use proto::ids::NodeId;
use transport::Seed;

use crate::api::{ClusterInfo, LinearizeFuture, Minted, NoQuorum, Standing, TokenTerms};
use crate::base::chain::chain;
use crate::cluster::Cluster;
use crate::cluster::liveness::Hint;
use crate::cluster::token::{JoinTicket, MAX_CONTACTS, TokenContact, TokenRole};

/// The running cluster, as the API asks about it.
#[derive(Clone, Debug)]
pub(super) struct Info(pub(super) Cluster);

impl ClusterInfo for Info {
    fn standing(&self) -> Standing {
        let standing = self.0.standing();
        Standing {
            leader: standing.leader,
            term: standing.term,
            voters: standing.voters.into_iter().collect(),
            learners: standing.learners.into_iter().collect(),
            is_changing: standing.is_changing,
            has_quorum: standing.has_quorum,
        }
    }

    fn loads(&self) -> Vec<Hint> {
        self.0.loads()
    }

    fn linearize(&self) -> LinearizeFuture {
        let proposer = self.0.proposer().clone();
        Box::pin(async move {
            let read = proposer.linearize().await;
            read.map(drop).map_err(|err| NoQuorum(chain(&err)))
        })
    }

    fn mint(&self, wanted: &TokenTerms) -> Result<Minted, String> {
        let seed = Seed::random().map_err(|err| chain(&err))?;
        let state = self.0.proposer().view().state();
        let cluster = state.cluster().ok_or("the cluster is not founded yet")?;
        let ticket = JoinTicket {
            role: match wanted.team {
                Some(_) => TokenRole::Host,
                None => TokenRole::Member,
            },
            cluster: cluster.id,
            token: wanted.id,
            seed: seed.bytes(),
            expires_at: wanted.expires_at,
            contacts: self.contacts(),
        };
        Ok(Minted {
            public_key: seed.public_key(),
            text: ticket.to_text(),
        })
    }
}

impl Info {
    /// Whom a joiner may ask: this node, which is surely up, then voters.
    fn contacts(&self) -> Vec<TokenContact> {
        let roster = self.0.mesh().roster();
        let here = self.0.mesh().here();
        let voters: BTreeSet<NodeId> = self.0.standing().voters.into_iter().collect();
        let members = roster.nodes.values();
        let members = members.filter(|contact| !roster.hosts.contains(&contact.id));
        let mut nodes: Vec<_> = members.collect();
        nodes.sort_by_key(|contact| (contact.id != here, !voters.contains(&contact.id)));
        let contact = |contact: &crate::cluster::Contact| TokenContact {
            key: contact.key,
            control: contact.control,
            bulk: contact.bulk,
        };
        nodes.into_iter().take(MAX_CONTACTS).map(contact).collect()
    }
}
