"""Git, which the SDK runs inside the capsule."""

from nodes import refused, shared
from wrenn import GitCommandError

_REPO = "/root/repo"


def a_repository_begins_in_the_home():
    capsule = shared()
    capsule.git.init(initial_branch="main")
    assert capsule.files.exists("/root/.git")
    assert capsule.git.status().branch == "main"
    capsule.files.remove("/root/.git")


def changes_are_committed():
    capsule = shared()
    git = capsule.git
    git.init(_REPO, initial_branch="main")
    git.configure_user("A B", "a@example.com")
    capsule.files.write(f"{_REPO}/file", "one\n")
    status = git.status(cwd=_REPO)
    assert status.has_untracked and [it.path for it in status.files] == ["file"]
    git.add(["file"], cwd=_REPO)
    assert git.status(cwd=_REPO).has_staged
    git.commit("a first 'one'", cwd=_REPO)
    assert git.status(cwd=_REPO).is_clean
    capsule.files.write(f"{_REPO}/file", "two\n")
    assert not git.status(cwd=_REPO).is_clean
    git.restore(["file"], cwd=_REPO)
    assert git.status(cwd=_REPO).is_clean
    git.commit("by another", allow_empty=True, author_name="C", author_email="c@d", cwd=_REPO)
    log = capsule.commands.run("git log --format='%an %s'", cwd=_REPO)
    assert log.stdout == "C by another\nA B a first 'one'\n", log
    git.reset(mode="hard", ref="HEAD~1", cwd=_REPO)


def branches_come_and_go():
    git = shared().git
    git.create_branch("side", cwd=_REPO)
    git.checkout_branch("side", cwd=_REPO)
    assert git.status(cwd=_REPO).branch == "side"
    assert {it.name for it in git.branches(cwd=_REPO)} == {"main", "side"}
    git.checkout_branch("main", cwd=_REPO)
    git.delete_branch("side", cwd=_REPO)
    assert [it.name for it in git.branches(cwd=_REPO)] == ["main"]
    with refused(GitCommandError):
        git.checkout_branch("none", cwd=_REPO)


def configuration_is_kept():
    git = shared().git
    git.set_config("wrenn.word", "a b", cwd=_REPO)
    assert git.get_config("wrenn.word", cwd=_REPO) == "a b"
    assert git.get_config("wrenn.none", cwd=_REPO) is None
    assert git.get_config("user.email", scope="global", cwd=_REPO) == "a@example.com"


def commits_go_to_a_remote_and_back():
    capsule = shared()
    git = capsule.git
    git.init("/root/remote.git", bare=True, initial_branch="main")
    git.remote_add("origin", "/root/remote.git", cwd=_REPO)
    assert git.remote_get("origin", cwd=_REPO) == "/root/remote.git"
    git.push("origin", "main", cwd=_REPO)
    git.clone("/root/remote.git", "/root/copy", branch="main", depth=1)
    assert capsule.files.read("/root/copy/file") == "one\n"
    capsule.files.write(f"{_REPO}/file", "three\n")
    git.add(all=True, cwd=_REPO)
    git.commit("three", cwd=_REPO)
    git.push("origin", "main", cwd=_REPO)
    git.pull("origin", "main", cwd="/root/copy")
    assert capsule.files.read("/root/copy/file") == "three\n"
    with refused(GitCommandError):
        git.clone("/root/none.git", "/root/nowhere")


def credentials_are_stored_when_asked_for():
    capsule = shared()
    capsule.git.dangerously_authenticate("u", "p:w", host="example.com")
    assert capsule.files.read("/root/.git-credentials") == "https://u:p%3aw@example.com\n"
