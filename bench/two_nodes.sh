#!/bin/bash
# Two nodes on one machine, the link cut in the middle: bench/two_nodes.sh
# Two network namespaces with host names, joined by one virtual cable, are the nodes; they share the
# disk, as nodes of a cluster do. An undisturbed run, then one whose cable is pulled: both sides end
# with the reason; the same two commands go on, to the same bits. Linux, no rights needed but user
# namespaces.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-$here/.venv/bin/python}" || command -v python3)
if [ "${1:-}" != inside ]; then
    home=$(mktemp -d)
    trap 'rm -rf "$home"' EXIT
    unshare -rnmu --kill-child bash "$0" inside "$home"
    exit
fi

cd "$2"
mount -t tmpfs none /run
mkdir /run/netns
printf '127.0.0.1 localhost\n10.9.0.1 node-a\n10.9.0.2 node-b\n' > hosts
mount --bind hosts /etc/hosts
hostname node-a
ip netns add b
ip link add cable-a type veth peer name cable-b netns b
ip address add 10.9.0.1/24 dev cable-a
ip link set cable-a up
ip link set lo up
ip -n b address add 10.9.0.2/24 dev cable-b
ip -n b link set cable-b up
ip -n b link set lo up

export OMP_NUM_THREADS=1
cat > toy.py << 'END'
dataset = 'toy'
n_layer = 2
n_head = 4
d_model = 64
d_ff = 128
block_size = 64
global_batch_tokens = 8 * 64
max_steps = 800
log_interval = 20
eval_interval = 800
eval_tokens = 640
sample_tokens = 0
save_interval = 100
device = 'cpu'
END
for i in $(seq 100); do echo "{\"text\": \"def add_$i(a, b): return a + b + $i; it is the $i-th\"}"; done > text.jsonl
"$python" "$here/prepare.py" toy.py --sources=text.jsonl --tokenizer=bytes --val_fraction=0.1 > prepare.log

on_both() { # RUN: the command of README.md on both nodes
    words=(-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d
           --rdzv_endpoint=node-a:29500 "$here/train.py" toy.py --out_dir="out/$1")
    "$python" "${words[@]}" > "$1-a.log" 2>&1 &
    a=$!
    ip netns exec b unshare -u bash -c 'hostname node-b; exec "$@"' - "$python" "${words[@]}" > "$1-b.log" 2>&1 &
    b=$!
}
ended() { # wait for both, print how
    code_a=0 code_b=0
    wait $a || code_a=$?
    wait $b || code_b=$?
    echo "$1: torchrun ended with $code_a on node-a and $code_b on node-b"
}
digest() { cat "out/$1/checkpoints/step_800/"{,training/}*.safetensors | sha256sum; }

on_both whole
ended "undisturbed"
[ $code_a = 0 ] && [ $code_b = 0 ] || { tail -n 5 whole-*.log; exit 1; }

on_both cut
until grep -q '"step": 240' out/cut/metrics.jsonl 2> /dev/null; do sleep 0.1; done
ip link set cable-a down
began=$SECONDS
echo "the link is cut"
ended "the link cut"
echo "both had ended after $((SECONDS - began)) s; what they said:"
grep -h '^error: ' cut-a.log cut-b.log || true
cat out/cut/status.json
[ $code_a != 0 ] && [ $code_b != 0 ] && [ $((SECONDS - began)) -lt 120 ] || exit 1

ip link set cable-a up
on_both cut
ended "started again"
grep -h '^resuming' cut-a.log
[ "$(digest whole)" = "$(digest cut)" ] || { echo "other weights than undisturbed"; exit 1; }
echo "weights and moments equal those of the undisturbed run, to the bit"
