//! The real machine under the real group: commands go in, answers come out, all survives.

use proto::ids::{KeyId, TeamId};
use proto::units::Stamp;
use wrenn_raft::command::{Command, Proposal, Receipt, Refusal};
use wrenn_raft::group::Group;
use wrenn_raft::link::NoPeers;
use wrenn_raft::state::{Key, State};
use wrenn_raft::wire::decode_answer;

use crate::common::{config, soon};

fn put_key(number: u8) -> Vec<u8> {
    let key = Key {
        id: KeyId([number; 16]),
        team: TeamId::default(),
        name: format!("key {number}"),
        hash: [number; 32],
        shown: "wrn_".into(),
        ..Key::default()
    };
    let command = Command::PutKey(key);
    let at = Stamp(1000);
    Proposal { at, command }.encode()
}

#[tokio::test]
async fn commands_are_answered_and_survive_a_restart_with_and_without_the_derived_state() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Group::<State>::open(config(dir.path()), NoPeers);
    let group = open().await.unwrap();
    group.bootstrap().await.unwrap();
    for number in 0..20 {
        let answer = group.propose(put_key(number), soon()).await.unwrap();
        assert_eq!(decode_answer(&answer.answer), Ok(Receipt::Done(1)));
    }
    let revoke = Proposal {
        at: Stamp(2000),
        command: Command::RevokeKey(KeyId([99; 16])),
    };
    let refused = group.propose(revoke.encode(), soon()).await.unwrap();
    assert!(matches!(
        decode_answer(&refused.answer),
        Err(Refusal::NoSuchKey(_))
    ));
    let before: Vec<_> = group.state().borrow().state.rows().collect();
    assert_eq!(before.len(), 20);
    group.shutdown().await;

    for derived in [true, false] {
        if !derived {
            std::fs::remove_dir_all(dir.path().join("state")).unwrap();
        }
        let group = open().await.unwrap();
        group.bootstrap().await.unwrap();
        let after: Vec<_> = group.state().borrow().state.rows().collect();
        assert!(after == before, "derived state there: {derived}");
        group.shutdown().await;
    }
}
