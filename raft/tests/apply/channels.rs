//! Channels: how far each has been told, whoever tells it.

use std::collections::BTreeSet;

use proto::ids::{ChannelId, TeamId};
use wrenn_raft::command::{Attributed, Command, Proposal, Receipt, Refusal, TellChannel};
use wrenn_raft::state::{Actor, Channel, EventId, Settings, State};

use crate::world::*;

fn channel(n: u8) -> Channel {
    Channel {
        id: ChannelId(mark(b'w', n)),
        team: TEAM,
        name: format!("channel {n}"),
        url: "https://example.org/".into(),
        secret: "s".repeat(16),
        kinds: BTreeSet::from(["capsule.create".into()]),
        enabled: true,
        ..Channel::default()
    }
}

fn known(world: &World, n: u8) -> Channel {
    let channel = world.state.channel(ChannelId(mark(b'w', n)));
    channel.expect("it is there").clone()
}

fn told(world: &World, n: u8, upto: EventId) -> TellChannel {
    TellChannel {
        id: known(world, n).id,
        from: known(world, n).cursor,
        upto,
        delivered: 1,
        given_up: 0,
        failure: String::new(),
    }
}

/// A world in which somebody has asked for something: from then on everything is noted.
fn noted(mut world: World) -> World {
    let change = Command::PutSettings(Settings {
        replicas: 3,
        ..world.state.settings()
    });
    let asked = Command::By(Attributed {
        actor: Actor::System,
        change: Box::new(change),
    });
    world.act(asked).expect("it may be asked for");
    world
}

#[test]
fn a_channel_is_told_of_what_comes_after_it() {
    let mut world = noted(World::founded());
    world.create(1, waiting(512)).expect("placed");
    let put = Command::PutChannel(channel(1));
    assert_eq!(world.act(put), Ok(Receipt::Done(1)));
    assert_eq!(known(&world, 1).cursor, world.state.newest_event(TEAM));
    world.run(1);
    let cursor = known(&world, 1).cursor;
    assert_eq!(world.state.events_after(TEAM, cursor, 9).events.len(), 1);
}

#[test]
fn of_two_leaders_that_tell_the_same_one_is_counted() {
    let mut world = noted(World::founded());
    world.act(Command::PutChannel(channel(1))).expect("put");
    world.create(1, waiting(512)).expect("placed");
    let newest = world.state.newest_event(TEAM);
    let first = told(&world, 1, newest);
    let say = Command::TellChannel(first.clone());
    assert_eq!(world.act(say.clone()), Ok(Receipt::Done(1)));
    assert_eq!(world.act(say), Ok(Receipt::Done(0)));
    assert_eq!(
        (known(&world, 1).delivered, known(&world, 1).cursor),
        (1, newest)
    );
    let back = TellChannel {
        from: newest,
        upto: EventId::FIRST,
        ..first
    };
    assert_eq!(world.act(Command::TellChannel(back)), Ok(Receipt::Done(0)));
}

#[test]
fn a_change_keeps_how_far_it_was_told_and_what_happened_while_off_is_not_sent() {
    let mut world = noted(World::founded());
    world.act(Command::PutChannel(channel(1))).expect("put");
    let began = known(&world, 1);
    world.create(1, waiting(512)).expect("placed");
    let renamed = Channel {
        name: "another".into(),
        ..channel(1)
    };
    world.act(Command::PutChannel(renamed)).expect("changed");
    let changed = known(&world, 1);
    assert_eq!(
        (changed.cursor, changed.created_at),
        (began.cursor, began.created_at)
    );
    for enabled in [false, true] {
        let next = Channel {
            enabled,
            ..channel(1)
        };
        world.act(Command::PutChannel(next)).expect("changed");
    }
    assert_eq!(known(&world, 1).cursor, world.state.newest_event(TEAM));
    let again = Channel {
        enabled: true,
        ..channel(1)
    };
    assert_eq!(world.act(Command::PutChannel(again)), Ok(Receipt::Done(0)));
}

#[test]
fn another_teams_channel_is_neither_replaced_nor_taken_away() {
    let mut world = noted(World::founded());
    world.act(Command::PutChannel(channel(1))).expect("put");
    let team = TeamId([9; 16]);
    let stolen = Channel { team, ..channel(1) };
    assert!(matches!(
        world.act(Command::PutChannel(stolen)),
        Err(Refusal::IdTaken(_))
    ));
    let id = known(&world, 1).id;
    assert_eq!(
        world.act(Command::DropChannel { team, id }),
        Ok(Receipt::Done(0))
    );
    let dropped = world.act(Command::DropChannel { team: TEAM, id });
    assert_eq!(dropped, Ok(Receipt::Done(1)));
    assert_eq!(world.state.channels().count(), 0);
}

#[test]
fn a_team_has_sixteen_at_most() {
    let mut world = noted(World::founded());
    for n in 0..16 {
        world.act(Command::PutChannel(channel(n))).expect("put");
    }
    let refused = world.act(Command::PutChannel(channel(16)));
    assert!(matches!(refused, Err(Refusal::Unfit(_))), "{refused:?}");
}

#[test]
fn channels_survive_as_rows_and_their_commands_as_bytes() {
    let mut world = noted(World::founded());
    world.act(Command::PutChannel(channel(1))).expect("put");
    world.create(1, waiting(512)).expect("placed");
    let tell = told(&world, 1, world.state.newest_event(TEAM));
    let id = tell.id;
    for command in [
        Command::PutChannel(channel(2)),
        Command::TellChannel(tell),
        Command::DropChannel { team: TEAM, id },
    ] {
        let proposal = Proposal {
            at: world.now,
            command: command.clone(),
        };
        assert_eq!(Proposal::decode(&proposal.encode()), Ok(proposal));
        world.act(command).expect("it fits");
        let again = State::from_rows(world.state.rows()).expect("own rows are readable");
        assert_eq!(again, world.state);
    }
}
