#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a cable (veth), each with its own name, loopback and sshd, and
# the door's way over hosts between them: DeepSpeed's launcher, pdsh, ssh. Checks what one host can't show: values that
# arrive as they were typed, the interface that is found, and that losing a rank, a host, the network or the launcher
# ends the run everywhere and says who was lost. Each case has two hosts of its own, and process ids of its own: DeepSpeed's launcher ends
# a run with `pkill -f`. A few run at once.
#
# A limit of DeepSpeed's launcher over pdsh, which the ranks can't mend: without ServerAliveInterval, pdsh waits for hours
# for a host that the network has lost (the ranks are gone all the same).
#
# Needs root and: apt-get install openssh-server openssh-client pdsh iproute2; without them it says so and ends with 0.
# Run it from anywhere, in the environment that has megalite installed: sudo env PATH="$PATH" tests/two_hosts.sh [CASE...]
set -euo pipefail

missing=()
for tool in ip ss ssh ssh-keygen pdsh unshare; do [ -n "$(type -P $tool)" ] || missing+=($tool); done
sshd=$(PATH="$PATH:/usr/sbin:/sbin" type -P sshd) || missing+=(sshd)
skip() { echo "skipped: two hosts on one machine: $1" && exit 0; }
[ "$(id -u)" = 0 ] || skip "only root can make network namespaces"
[ ${#missing[@]} = 0 ] || skip "not installed: ${missing[*]} (openssh-server, openssh-client, pdsh, iproute2)"
unshare --net --pid --fork --mount-proc true 2>/dev/null || skip "this machine allows no namespaces"

at_once=3
patience=300 # seconds for anything; how long it takes is printed
here=$(cd "$(dirname "$0")" && pwd)
root=${here%/*}

prepare() { # what the hosts of all cases share
    mkdir -p /run/sshd "$all/bin"
    ssh-keygen -q -t ed25519 -N '' -f "$all/host_key"
    ssh-keygen -q -t ed25519 -N '' -f "$all/key"
    cat >"$all/bin/ssh" <<END
#!/bin/bash
exec -a ssh $(type -P ssh) -i $all/key -p 2222 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -q \
    -o ServerAliveInterval=5 -o ServerAliveCountMax=3 "\$@"
END
    chmod 755 "$all/bin/ssh"
    export PATH="$all/bin:$PATH" PYTHONPATH="$root" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
    printf '10.77.0.1 slots=2\n10.77.0.2 slots=2\n' >"$all/hostfile"
}

if [ "${1:-}" != --one ]; then
    all=$(mktemp -d)
    chmod 755 "$all"
    trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$all"' EXIT
    trap 'exit 130' INT TERM
    prepare
fi

# ---- the two hosts of a case

on() { # on HOST COMMAND...: run it there, under that host's name
    local host=$1
    shift
    ip netns exec "$host" unshare --uts sh -c 'hostname "$0"; exec "$@"' "$host" "$@"
}

set_up() {
    mkdir -p "$work" /run/netns
    mount -t tmpfs none /run/netns
    ip netns add "$a"
    ip netns add "$b"
    ip link add mega-a0 netns "$a" type veth peer name mega-b0 netns "$b"
    ip -n "$a" addr add 10.77.0.1/24 dev mega-a0
    ip -n "$b" addr add 10.77.0.2/24 dev mega-b0
    ip -n "$a" link set mega-a0 up
    ip -n "$b" link set mega-b0 up
    local host
    for host in "$a" "$b"; do
        ip -n "$host" link set lo up
        on "$host" "$sshd" -D -f /dev/null -p 2222 -h "$all/host_key" -o StrictModes=no -o PidFile=none \
            -o AuthorizedKeysFile="$all/key.pub" -o PermitRootLogin=yes -o UsePAM=no 2>>"$work/sshd.log" &
        wait_until "sshd" ip netns exec "$host" bash -c "</dev/tcp/127.0.0.1/2222"
    done
}

wait_until() { # wait_until WHAT COMMAND...: until it succeeds
    local what=$1 end=$((SECONDS + patience))
    shift
    until "$@" 2>/dev/null; do
        [ $SECONDS -lt $end ] || { echo "FAIL: $name: not within $patience s: $what" && show && exit 1; }
        sleep 0.2
    done
}

show() { sed 's/^/    /' "$work"/{sshd.log,out,err} 2>/dev/null || true; }

pids() { # pids HOST PATTERN: its processes whose command line matches
    local pid
    for pid in $(ip netns pids "$1"); do
        tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qE "$2" && echo "$pid"
    done || true
}

ranks_on() { # ranks_on HOST: process ids of its ranks
    local pid
    for pid in $(pids "$1" '^[^ ]*python[^ ]* -u [^ ]*joined_rank.py'); do
        grep -qz '^RANK=' "/proc/$pid/environ" 2>/dev/null && echo "$pid"
    done || true
}

# ---- a run and what is expected of its end

door='import sys; from megalite.run.hosts import run_over_hosts
sys.exit(run_over_hosts(["--hostfile", sys.argv[1], "--master_addr", "10.77.0.1"], sys.argv[2], sys.argv[3:]))'

start_run() { # start_run STEPS: start it in the background on host a
    printf 'steps: %s\npeer_timeout: 10\nstart_timeout: %s\n' "$1" $patience >"$work/config.yaml"
    on "$a" python -c "$door" "$all/hostfile" "$here/joined_rank.py" --config "$work/config.yaml" tell x \
        >"$work/out" 2>"$work/err" &
    run=$!
}

at_work() { [ "$(ls "$work" | grep -c at-work)" = 4 ]; }
none_left() { [ -z "$(ranks_on "$a")$(ranks_on "$b")" ]; }
ended() { ! kill -0 "$run"; }

start_long_run() { # the same, and wait until all ranks are at work
    start_run 100000
    wait_until "all ranks are at work" at_work
    began=$SECONDS
}

end_run() { # end_run PATTERN [LINES [CODE]]: all ranks go, and at most LINES (1) lines are errors; one matches PATTERN
    local code=0 took
    wait_until "no rank is left" none_left
    took=$((SECONDS - began))
    wait_until "the door has ended" ended
    wait "$run" || code=$?
    if [ $code != 0 ] && [ "${3:-$code}" = $code ] && grep -qE "$1" "$work/err" &&
        [ "$(grep -c "error:" "$work/err")" -le "${2:-1}" ]; then
        echo "pass: $name: gone after $took s, code $code: $(grep -m1 error: "$work/err")"
    else
        echo "FAIL: $name: $took s, code $code, said:" && show && exit 1
    fi
}

# ---- the cases

cases="values add_up killed_on_b killed_on_a stopped power cable connection pdsh interrupt"

values() { # what is typed into the door is what the ranks get
    local hostile='$HOME $(echo x) `echo y` %h %n "quoted" ü'
    cd "$root"
    on "$a" python launch/infer.py --hostfile "$all/hostfile" --master_addr 10.77.0.1 --config configs/infer/demo.yaml \
        parallel.tp=2 parallel.dp=2 sampling.max_tokens=2 monitor.report=false "output.file=$work/out.jsonl" \
        "input.prompts=['$hostile']" >"$work/out" 2>"$work/err" &
    run=$!
    wait_until "the door has ended" ended
    if wait $run && python -c 'import json, sys
sys.exit(json.load(open(sys.argv[1]))["prompt"] != sys.argv[2])' "$work/out.jsonl" "$hostile"; then
        echo "pass: values: a prompt that shells would change arrives as it was typed"
    else
        echo "FAIL: values:" && show && exit 1
    fi
}

add_up() {
    start_run 3
    wait_until "the door has ended" ended
    if wait $run && [ "$(grep -c "sum 6, .*gloo on mega-[ab]0, .*open False" "$work/out")" = 4 ]; then
        echo "pass: add_up: four ranks add up over the cable's interfaces, nothing listens on all addresses"
    else
        echo "FAIL: add_up:" && show && exit 1
    fi
}

killed_on_b() {
    start_long_run
    kill -9 "$(ranks_on "$b" | tail -1)"
    end_run "rank [23] \(pid [0-9]+ on mega-b\) was lost"
}

killed_on_a() {
    start_long_run
    kill -9 "$(ranks_on "$a" | head -1)"
    end_run "rank [01] \(pid [0-9]+ on mega-a\) was lost" 2
}

stopped() {
    start_long_run
    kill -STOP "$(ranks_on "$b" | tail -1)"
    end_run "rank [23] \(pid [0-9]+ on mega-b\) was lost: no sign of life"
}

power() {
    start_long_run
    ip netns pids "$b" | xargs kill -9
    end_run "ranks 2, 3 on mega-b were lost"
}

cable() {
    start_long_run
    ip -n "$b" link set mega-b0 down
    end_run "ranks 2, 3 on mega-b were lost: no sign of life"
}

connection() { # the one that started the ranks of host b
    start_long_run
    pids "$a" '^ssh .*10.77.0.2.*joined_rank' | xargs kill -9
    end_run "sshd.* on mega-b, which started its ranks \(2, 3\), is gone"
}

pdsh() { # DeepSpeed's launcher leaves with 0 then
    start_long_run
    pids "$a" '^pdsh ' | xargs kill -9
    end_run "deepspeed left with code 0, but rank 0 has not said how the run ended" 1 70
}

interrupt() { # it goes through pdsh, which ends with it, so nothing of what the ranks say arrives; what they leave does
    start_long_run
    kill -INT "$(pids "$a" '^[^ ]*python[^ ]* -c import sys; from megalite')"
    end_run "" 1 130
    [ -e "$work/config.yaml.stopped" ] || { echo "FAIL: interrupt: the ranks did not drain" && exit 1; }
}

if [ "${1:-}" = --one ]; then # --one CASE FOLDER: in namespaces of its own, which end all its processes with it
    name=$2 all=$3 work=$3/$2 a=mega-a b=mega-b
    set_up
    "$name"
    exit
fi

started=()
for case in ${*:-$cases}; do
    while [ "$(jobs -rp | wc -l)" -ge $at_once ]; do sleep 0.2; done
    unshare --mount --pid --fork --kill-child --mount-proc "$0" --one "$case" "$all" &
    started+=($!)
done
failures=0
for pid in "${started[@]}"; do wait "$pid" || failures=$((failures + 1)); done
echo "two hosts: $failures of ${#started[@]} cases failed, $SECONDS s"
[ $failures = 0 ]
