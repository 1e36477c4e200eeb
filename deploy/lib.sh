# shellcheck shell=bash
# What the scripts under deploy/ share: where things are, how steps are shown, how root is got.
#
# Sourced, never run. A script sources it as its first act:
#   source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# All state lives under $WRENN_DEV_DIR (default `.wrenn-dev` in the checkout, ignored by git),
# so that removing that directory and stopping what `wrenn dev` started leaves nothing behind.

set -euo pipefail

WRENN_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# State of the local cluster: node directories, logs of steps, and the images.
WRENN_DEV_DIR=${WRENN_DEV_DIR:-$WRENN_ROOT/.wrenn-dev}
# Kernel, initramfs and templates; shared by all nodes of a machine.
WRENN_IMAGES=${WRENN_IMAGES:-$WRENN_DEV_DIR/images}
# Triple of the static guest agent. Given to cargo explicitly, because otherwise the static
# flag would also reach build scripts and procedural macros, which must be dynamic.
GUEST_TRIPLE=x86_64-unknown-linux-gnu
export WRENN_ROOT WRENN_DEV_DIR WRENN_IMAGES GUEST_TRIPLE

# Steps of this run, and the one under way; set by `steps_total`.
STEP_COUNT=0
STEP_NUMBER=0
# Lines of a failed step's log that are shown.
LOG_TAIL_LINES=25

note() { printf '%s\n' "$*" >&2; }

# die TEXT [HINT]: says what went wrong and what to do, and ends the script.
die() {
	note "error: $1"
	if [[ $# -gt 1 ]]; then note "  hint: $2"; fi
	exit 1
}

# now_ms: milliseconds of the wall clock, for showing how long a step took.
now_ms() { local us=${EPOCHREALTIME/[.,]/}; printf '%s' "$((us / 1000))"; }

# seconds_since MS: `3.2` for a step that began at MS.
seconds_since() {
	local took=$(($(now_ms) - $1))
	printf '%d.%d' "$((took / 1000))" "$((took % 1000 / 100))"
}

steps_total() { STEP_COUNT=$1 STEP_NUMBER=0; }

# step TEXT HINT COMMAND...: runs one step with its output in a log; prints one line for it, and
# the end of the log and the hint if it fails.
step() {
	local text=$1 hint=$2 began log
	shift 2
	STEP_NUMBER=$((STEP_NUMBER + 1))
	began=$(now_ms)
	log=$WRENN_DEV_DIR/logs/step-$STEP_NUMBER.log
	mkdir -p "$WRENN_DEV_DIR/logs"
	printf '[%d/%d] %s …' "$STEP_NUMBER" "$STEP_COUNT" "$text"
	if run_logged "$log" "$@"; then
		printf ' done (%s s)\n' "$(seconds_since "$began")"
		return
	fi
	printf ' FAILED (%s s)\n' "$(seconds_since "$began")"
	note "last lines of $log:"
	tail -n "$LOG_TAIL_LINES" "$log" | sed 's/^/  | /' >&2
	die "$text failed" "$hint"
}

# run_logged LOG COMMAND...: in a shell of its own, so that `set -e` also holds in a function
# (bash switches it off inside an `if`) and `die` ends only the step.
run_logged() {
	local log=$1 status=0
	shift
	set +e
	(
		set -e
		"$@"
	) >"$log" 2>&1 </dev/null
	status=$?
	set -e
	return "$status"
}

have() { command -v "$1" >/dev/null 2>&1; }

# as_root COMMAND...: directly when root already, else through sudo.
as_root() {
	if [[ $EUID -eq 0 ]]; then
		"$@"
	elif have sudo; then
		sudo "$@"
	else
		die "this needs root: $*" "run the script as root, or install sudo"
	fi
}

# become_root ARGS...: goes on as root, with the settings of this run kept.
become_root() {
	[[ $EUID -eq 0 ]] && return
	have sudo || die "this needs root" "run $0 as root, or install sudo"
	exec sudo WRENN_DEV_DIR="$WRENN_DEV_DIR" WRENN_IMAGES="$WRENN_IMAGES" "$0" "$@"
}

# need_commands COMMAND...: all of them are here, or says how to get them.
need_commands() {
	local command
	for command in "$@"; do
		have "$command" || die "$command is not installed" "run deploy/deps first"
	done
}

# digest_of FILE...: one SHA-256 over the contents of all files, in the order given.
digest_of() { cat "$@" | sha256sum | cut -d' ' -f1; }

# stamped STAMP WANTED FILE...: true if STAMP holds exactly WANTED and every FILE is there and not
# empty. What a script writes last is its stamp, so a build that was cut short never counts.
stamped() {
	local stamp=$1 wanted=$2 file
	shift 2
	[[ -f $stamp && $(<"$stamp") == "$wanted" ]] || return 1
	for file in "$@"; do [[ -s $file ]] || return 1; done
}

# give_back PATH...: hands what root made to the user who called sudo.
give_back() {
	if [[ -n ${SUDO_UID:-} && -n ${SUDO_GID:-} ]]; then chown -R "$SUDO_UID:$SUDO_GID" "$@"; fi
}

# find_cargo: puts rustup's directory on the path where a login shell would have done so.
find_cargo() {
	if ! have cargo && [[ -x ${HOME:-/root}/.cargo/bin/cargo ]]; then
		PATH=$PATH:${HOME:-/root}/.cargo/bin
	fi
}

# check_rust: a Rust as new as Cargo.toml asks for.
check_rust() {
	local wanted found
	local hint="install Rust from rustup.rs or update it with: rustup update stable"
	wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$WRENN_ROOT/Cargo.toml")
	find_cargo
	have cargo || die "cargo is not installed; Rust $wanted or newer is needed" "$hint"
	found=$(cd "$WRENN_ROOT" && rustc --version | cut -d' ' -f2)
	if [[ $(printf '%s\n%s\n' "$wanted" "$found" | sort -V | head -n 1) != "$wanted" ]]; then
		die "Rust $found is too old; $wanted or newer is needed" "$hint"
	fi
	echo "Rust $found"
}
