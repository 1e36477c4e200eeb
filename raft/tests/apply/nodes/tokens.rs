//! Join tokens: whom one lets in, how often, and until when.

use super::*;

#[test]
fn a_joiner_gets_the_index_of_its_entry_and_the_team_of_its_token() {
    let mut world = World::founded();
    let team = TeamId([7; 16]);
    let expires_at = Stamp(world.now.0 + HOUR_MS);
    let scoped = Token {
        team: Some(team),
        ..token(1, 1, expires_at)
    };
    world.act(Command::PutToken(scoped)).expect("put");
    let liar = Node {
        id: NodeId(77),
        cordoned: true,
        liveness: Liveness::Lost { since: Stamp(3) },
        ..node(2)
    };
    let id = NodeId(world.index + 1);
    assert_eq!(world.act(redeem(1, liar)), Ok(Receipt::Admitted(id)));
    let known = world.state.node(id).expect("let in");
    assert_eq!(
        (known.team, known.liveness, known.cordoned),
        (Some(team), Liveness::Alive, false)
    );
    assert_eq!(known.admitted_at, world.now);
}

#[test]
fn the_same_key_gets_the_same_id_again_even_when_the_token_is_over() {
    let mut world = with_token(1);
    let first = world.act(redeem(1, node(2)));
    world.act(Command::RevokeToken(token_id(1))).expect("known");
    world.wait(Duration::from_secs(7200));
    assert_eq!(world.act(redeem(1, node(2))), first);
    assert_eq!(world.state.nodes().count(), 2);
}

#[test]
fn of_two_joiners_with_one_use_one_gets_in() {
    let mut world = with_token(1);
    world.act(redeem(1, node(2))).expect("the first");
    let refused = Err(Refusal::TokenUsed(token_id(1).to_string()));
    assert_eq!(world.act(redeem(1, node(3))), refused);
    assert_eq!(world.state.nodes().count(), 2);
}

#[test]
fn a_token_is_good_until_its_last_millisecond() {
    let mut world = with_token(2);
    let expiry = world.state.token(token_id(1)).expect("known").expires_at;
    world.now = Stamp(expiry.0 - 1000);
    world.act(redeem(1, node(2))).expect("just in time");
    let refused = Err(Refusal::TokenExpired(token_id(1).to_string()));
    assert_eq!(world.act(redeem(1, node(3))), refused);
}

#[test]
fn a_withdrawn_token_and_an_unknown_one_are_refused_alike() {
    let mut world = with_token(2);
    world.act(Command::RevokeToken(token_id(1))).expect("known");
    for n in [1, 9] {
        let refused = Err(Refusal::NoSuchToken(token_id(n).to_string()));
        assert_eq!(world.act(redeem(n, node(2))), refused);
    }
    let refused = Err(Refusal::NoSuchToken(token_id(9).to_string()));
    assert_eq!(world.act(Command::RevokeToken(token_id(9))), refused);
}

#[test]
fn putting_a_token_again_gives_no_uses_back_and_its_id_stays_taken() {
    let mut world = with_token(1);
    let made = world.state.token(token_id(1)).expect("known").clone();
    world.act(redeem(1, node(2))).expect("let in");
    world.act(Command::RevokeToken(token_id(1))).expect("known");
    let used = world.state.token(token_id(1)).expect("known").clone();
    let again = Command::PutToken(made.clone());
    assert_eq!(world.act(again), Ok(Receipt::Done(1)));
    assert_eq!(world.state.token(token_id(1)), Some(&used));
    let other = Token {
        public_key: [3; 32],
        ..made
    };
    let refused = world.act(Command::PutToken(other));
    assert!(matches!(refused, Err(Refusal::IdTaken(_))), "{refused:?}");
}

#[test]
fn a_new_token_is_open_and_unused_whatever_it_says() {
    let mut world = World::founded();
    let expires_at = Stamp(world.now.0 + HOUR_MS);
    let forged = Token {
        redeemed: vec![(node_key(9), FOUNDER)],
        revoked: true,
        ..token(1, 1, expires_at)
    };
    world.act(Command::PutToken(forged)).expect("put");
    let known = world.state.token(token_id(1)).expect("known");
    assert!(known.is_open(world.now) && known.redeemed.is_empty());
    let useless = Command::PutToken(token(2, 0, expires_at));
    assert_eq!(
        unfit(world.act(useless)),
        "a join token has at least one use"
    );
}

#[test]
fn a_token_is_forgotten_a_day_after_its_end_when_another_is_made() {
    let mut world = with_token(1);
    world.wait(Duration::from_secs(24 * 3600));
    let expires_at = Stamp(world.now.0 + HOUR_MS);
    let put = |world: &mut World, n| {
        let applied = world.step(Command::PutToken(token(n, 1, expires_at)));
        (applied.touched.len(), world.state.tokens().count())
    };
    assert_eq!(put(&mut world, 2), (1, 2));
    world.wait(Duration::from_secs(3600));
    assert_eq!(put(&mut world, 3), (2, 2));
}

#[test]
fn a_member_is_not_let_in_twice_by_another_token() {
    let (mut world, second, _) = World::of_three();
    let expires_at = Stamp(world.now.0 + HOUR_MS);
    let another = Command::PutToken(token(1, 1, expires_at));
    world.act(another).expect("put");
    let why = unfit(world.act(redeem(1, node(2))));
    assert_eq!(why, format!("this node is a member already, as {second}"));
    assert_eq!(
        world.state.token(token_id(1)).expect("known").uses_left,
        1,
        "no use was burned"
    );
}

#[test]
fn no_two_nodes_get_one_name() {
    let mut world = with_token(9);
    let named = |world: &mut World, n, name: &str| {
        let joiner = Node {
            name: name.into(),
            ..node(n)
        };
        let Ok(Receipt::Admitted(id)) = world.act(redeem(1, joiner)) else {
            panic!("not let in");
        };
        world.state.node(id).expect("known").name.clone()
    };
    let next = world.index + 2;
    let taken = format!("host1-{next}");
    assert_eq!(named(&mut world, 2, &taken), taken);
    let expected = format!("host1-{next}-{next}");
    assert_eq!(named(&mut world, 3, "host1"), expected);
}
