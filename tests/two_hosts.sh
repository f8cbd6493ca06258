#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a cable (veth), each with its own name, loopback and sshd, and
# DeepSpeed's own multi-host path over pdsh between them. Checks what one host can't show: the interface that is found,
# and that losing a rank, a host, the network or the launcher ends the run everywhere within 10 s and says who was lost.
#
# Two limits of DeepSpeed's launcher over pdsh, which the ranks can't mend: without ServerAliveInterval, pdsh waits for
# hours for a host that the network has lost (the ranks are gone all the same); and when pdsh or `deepspeed` itself is
# killed with SIGKILL, the connections to the hosts stay, so the run goes on until a rank next writes to its output.
#
# Needs root and: apt-get install openssh-server openssh-client pdsh iproute2. Takes about three minutes.
# Run it from anywhere, in the environment that has megalite installed: sudo env PATH="$PATH" tests/two_hosts.sh
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
chmod 755 "$work"
a=mega-a b=mega-b
failures=0

clean() {
    for host in $a $b; do
        ip netns pids $host 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns del $host 2>/dev/null || true
    done
    rm -rf "$work"
}
trap clean EXIT

on() { # on HOST COMMAND...: run it there, under that host's name
    local host=$1
    shift
    ip netns exec "$host" unshare --uts sh -c 'hostname "$0"; exec "$@"' "$host" "$@"
}

# ---- the two hosts

ip netns add $a
ip netns add $b
ip link add ${a}0 netns $a type veth peer name ${b}0 netns $b
ip -n $a addr add 10.77.0.1/24 dev ${a}0
ip -n $b addr add 10.77.0.2/24 dev ${b}0
for host in $a $b; do
    ip -n $host link set lo up
    ip -n $host link set ${host}0 up
done
mkdir -p /run/sshd
ssh-keygen -q -t ed25519 -N '' -f "$work/host_key"
ssh-keygen -q -t ed25519 -N '' -f "$work/key"

start_sshd() { # start_sshd HOST
    on "$1" "$(command -v sshd)" -D -f /dev/null -p 2222 -h "$work/host_key" -o StrictModes=no -o PidFile=none \
        -o AuthorizedKeysFile="$work/key.pub" -o PermitRootLogin=yes -o UsePAM=no 2>>"$work/sshd.log" &
    for _ in $(seq 50); do
        ip netns exec "$1" bash -c "</dev/tcp/127.0.0.1/2222" 2>/dev/null && return
        sleep 0.1
    done
    echo "sshd on $1 did not come up" && cat "$work/sshd.log" && exit 1
}
start_sshd $a
start_sshd $b
printf '10.77.0.1 slots=2\n10.77.0.2 slots=2\n' >"$work/hostfile"

# ---- a run and what is expected of its end

export PDSH_SSH_ARGS_APPEND="-i $work/key -p 2222 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -q"
PDSH_SSH_ARGS_APPEND+=" -o ServerAliveInterval=2 -o ServerAliveCountMax=3"
export PYTHONPATH="${here%/*}" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

ranks_on() { # ranks_on HOST: process ids of its ranks
    local pid
    for pid in $(ip netns pids "$1"); do
        grep -qz '^RANK=' "/proc/$pid/environ" 2>/dev/null && grep -qz 'joined_rank.py' "/proc/$pid/cmdline" && echo "$pid"
    done || true
}

start_run() { # start_run STEPS: start it in the background on host a, wait until all ranks are at work
    printf 'steps: %s\npeer_timeout: 6\nstart_timeout: 300\n' "$1" >"$work/config.yaml"
    on $a python -m deepspeed.launcher.runner --hostfile "$work/hostfile" --no_ssh_check --master_addr 10.77.0.1 \
        --log_level critical --no_local_rank "$here/joined_rank.py" --config "$work/config.yaml" x x \
        >"$work/out" 2>"$work/err" &
    run=$!
    [ "$1" -lt 100 ] && return
    for _ in $(seq 3000); do
        [ "$(ranks_on $a | wc -l)" = 2 ] && [ "$(ranks_on $b | wc -l)" = 2 ] && [ "$(connections)" -ge 3 ] && break
        sleep 0.1
    done
    sleep 2
}

connections() { # established connections between ranks, seen from host a: the watch and gloo
    ip netns exec $a ss -Htn state established | grep -vc ':2222' || true
}

end_run() { # end_run NAME PATTERN: all ranks must be gone within 10 s, and exactly one line on a host match PATTERN
    local began=$SECONDS code=0 lines
    while [ -n "$(ranks_on $a)$(ranks_on $b)" ] && [ $((SECONDS - began)) -le 12 ]; do sleep 0.2; done
    local took=$((SECONDS - began)) left
    left="$(ranks_on $a) $(ranks_on $b)"
    kill -9 $left 2>/dev/null || true
    timeout 20 tail --pid=$run -f /dev/null || kill -9 $run
    wait $run || code=$?
    lines=$(grep -c "error:" "$work/err" || true)
    if [ $took -le 10 ] && [ $code != 0 ] && grep -qE "$2" "$work/err" && [ "$lines" -le "${3:-1}" ]; then
        echo "pass: $1: gone after $took s, code $code: $(grep -m1 error: "$work/err")"
    else
        echo "FAIL: $1: $took s, code $code, left:$left, said:"
        sed 's/^/    /' "$work/err"
        failures=$((failures + 1))
    fi
}

# ---- the cases

start_run 3
if timeout 300 tail --pid=$run -f /dev/null && wait $run && [ "$(grep -c "sum 6, .*gloo on mega-[ab]0, .*open False" "$work/out")" = 4 ]; then
    echo "pass: four ranks add up over the cable's interfaces, nothing listens on all addresses"
else
    echo "FAIL: a plain run:" && cat "$work/out" "$work/err"
    failures=$((failures + 1))
fi

start_run 600
kill -9 "$(ranks_on $b | tail -1)"
end_run "a rank on host b is killed" "rank [23] \(pid [0-9]+ on $b\) was lost"

start_run 600
kill -9 "$(ranks_on $a | head -1)"
end_run "a rank on host a is killed" "rank [01] \(pid [0-9]+ on $a\) was lost" 2

start_run 600
kill -STOP "$(ranks_on $b | tail -1)"
end_run "a rank on host b is stopped" "rank [23] \(pid [0-9]+ on $b\) was lost: no sign of life"

start_run 600
ip netns pids $b | xargs kill -9
end_run "host b loses power" "ranks 2, 3 on $b were lost"
start_sshd $b

start_run 600
ip -n $b link set ${b}0 down
end_run "the cable is cut" "ranks 2, 3 on $b were lost: no sign of life"
ip -n $b link set ${b}0 up

start_run 600
pgrep -f "^ssh .*10.77.0.2.*joined_rank" | xargs kill -9
end_run "the connection that started host b is killed" "sshd.* on $b, which started its ranks \(2, 3\), is gone"

# The signal goes through pdsh, which ends with it, so nothing of what the ranks say arrives; what they leave does.
start_run 600
kill -INT $(pgrep -f "deepspeed.launcher.runner.*$work")
end_run "the launcher is interrupted" ""
[ -e "$work/config.yaml.stopped" ] || { echo "FAIL: the ranks did not drain" && failures=$((failures + 1)); }

exit $failures
