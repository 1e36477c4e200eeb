use proptest::prelude::*;

use super::*;

fn member(path: &str, kind: Kind) -> Member {
    Member {
        path: path.to_owned(),
        kind,
        mode: 0o644,
        size: 1,
        owner: (0, 0),
        modified: 0,
        capability: Vec::new(),
        offset: 0,
    }
}

/// Layers, each of members by path and kind; a path that ends in a slash is a directory, one with an arrow
/// a symbolic link, one with an equals sign another name.
fn made(layers: &[&[&str]]) -> Result<Tree, TreeError> {
    let mut tree = Tree::default();
    for (layer, members) in (0..).zip(layers) {
        for (at, text) in (0..).zip(*members) {
            let source = Source { layer, member: at };
            tree.add(source, &read(text), true)?;
        }
    }
    tree.finish();
    Ok(tree)
}

fn read(text: &str) -> Member {
    if let Some((path, target)) = text.split_once(" -> ") {
        return member(path, Kind::Symlink(target.to_owned()));
    }
    if let Some((path, target)) = text.split_once(" = ") {
        return member(path, Kind::Link(target.to_owned()));
    }
    match text.strip_suffix('/') {
        Some(path) => member(path, Kind::Directory),
        None => member(text, Kind::File),
    }
}

fn paths(tree: &Tree) -> Vec<&str> {
    tree.nodes().map(|(path, _)| path).collect()
}

fn source(tree: &Tree, path: &str) -> Source {
    match tree.nodes.get(path) {
        Some((_, Node::File { source, .. })) => *source,
        other => panic!("{path} is {other:?}"),
    }
}

#[test]
fn a_later_layer_replaces_removes_and_hides_what_lower_ones_have() {
    let tree = made(&[
        &["a/", "a/one", "a/two", "b/", "b/old", "c"],
        &[
            "a/one",
            "a/.wh.two",
            "b/.wh..wh..opq",
            "b/new",
            ".wh.c",
            ".wh..wh.plnk",
        ],
    ]);
    let tree = tree.expect("a tree");
    assert_eq!(paths(&tree), ["a", "a/one", "b", "b/new"]);
    assert_eq!(
        source(&tree, "a/one"),
        Source {
            layer: 1,
            member: 0
        }
    );
}

#[test]
fn what_a_layer_has_itself_is_not_removed_by_it_in_whichever_order() {
    for layer in [
        ["d/new", "d/.wh..wh..opq", "d/.wh.new"],
        ["d/.wh.new", "d/.wh..wh..opq", "d/new"],
    ] {
        let tree = made(&[&["d/", "d/old"], &layer]).expect("a tree");
        assert_eq!(paths(&tree), ["d", "d/new"]);
    }
}

#[test]
fn members_below_a_link_go_where_it_leads_and_never_out() {
    let tree = made(&[
        &["usr/lib/", "lib -> usr/lib", "up -> ../../../etc"],
        &["lib/x", "up/y"],
    ]);
    let tree = tree.expect("a tree");
    assert_eq!(
        paths(&tree),
        ["etc", "etc/y", "lib", "up", "usr", "usr/lib", "usr/lib/x"]
    );
    let looped = made(&[&["a -> b", "b -> a", "a/x"]]);
    assert_eq!(looped.expect_err("a loop"), TreeError::Links("a/x".into()));
    let below = made(&[&["file", "file/x"]]);
    assert_eq!(
        below.expect_err("a file"),
        TreeError::BelowFile("file/x".into())
    );
    let deep = made(&[&["file", "file/x/y"]]);
    assert_eq!(
        deep.expect_err("a file"),
        TreeError::BelowFile("file/x/y".into())
    );
}

#[test]
fn another_name_keeps_its_contents_when_the_first_is_replaced() {
    let tree = made(&[&["a", "b = a"], &["a"]]).expect("a tree");
    assert_eq!(
        source(&tree, "b"),
        Source {
            layer: 0,
            member: 0
        }
    );
    assert_eq!(
        source(&tree, "a"),
        Source {
            layer: 1,
            member: 0
        }
    );
    assert_eq!(tree.bytes(), 2);
    let alone = made(&[&["b = a"]]).expect_err("no target");
    assert!(matches!(alone, TreeError::NoTarget { .. }));
}

#[test]
fn devices_are_refused_but_where_the_guest_has_its_own() {
    let mut tree = Tree::default();
    let at = Source {
        layer: 0,
        member: 0,
    };
    tree.add(at, &member("dev/null", Kind::Special), false)
        .expect("left out");
    tree.add(at, &member("run/x", Kind::File), false)
        .expect("left out");
    assert_eq!(paths(&tree), Vec::<&str>::new());
    let refused = tree.add(at, &member("etc/null", Kind::Special), false);
    assert_eq!(refused, Err(TreeError::Special("etc/null".into())));
}

#[test]
fn a_plain_archive_has_no_names_that_remove() {
    let mut tree = Tree::default();
    let at = Source {
        layer: 0,
        member: 0,
    };
    tree.add(at, &member("a/.wh.b", Kind::File), false)
        .expect("added");
    assert!(paths(&tree).contains(&"a/.wh.b"));
}

#[test]
fn a_shell_is_found_behind_links() {
    let tree = made(&[&["bin -> usr/bin", "usr/bin/dash", "usr/bin/sh -> dash"]]).expect("a tree");
    assert!(tree.has_file("bin/sh"));
    assert!(!tree.has_file("bin/bash") && !tree.has_file("usr"));
}

fn some_member() -> impl Strategy<Value = String> {
    let path = r"(a|b|c|\.wh\.a|\.wh\.\.wh\.(\.opq|plnk))(/(a|b|c|\.wh\.b)){0,2}";
    prop_oneof![
        path.prop_map(|it: String| it),
        path.prop_map(|it| format!("{it}/")),
        (path, "(/|\\.\\./)?(a|b|c)(/(a|\\.\\.)){0,2}")
            .prop_map(|(path, to)| format!("{path} -> {to}")),
        (path, "(a|b|c)(/(a|b)){0,1}").prop_map(|(path, to)| format!("{path} = {to}")),
    ]
}

proptest! {
    /// Whatever the layers are: each path's parents are directories, and nothing is a note to a driver.
    #[test]
    fn every_parent_is_a_directory(
        layers in proptest::collection::vec(proptest::collection::vec(some_member(), 0..8), 0..4),
    ) {
        let mut tree = Tree::default();
        for (layer, members) in (0..).zip(&layers) {
            for (at, text) in (0..).zip(members) {
                // What does not fit is refused, and leaves the tree whole.
                let _ = tree.add(Source { layer, member: at }, &read(text), true);
            }
        }
        tree.finish();
        for path in paths(&tree) {
            let (parent, name) = split(path);
            prop_assert!(!name.starts_with(WHITEOUT), "{}", path);
            let is_directory = matches!(tree.nodes.get(parent), Some((_, Node::Directory(_))));
            prop_assert!(parent.is_empty() || is_directory, "{} of {}", parent, path);
        }
    }
}
