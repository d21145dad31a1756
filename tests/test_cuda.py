"""What only a GPU can show: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py -q"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY, metrics, run_script, write_data_set
from conftest import documents as some_documents
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import model
from model import LLaMA, ModelConfig, attend, document_bounds
from plainllama import settings
from plainllama.generation import generate
from plainllama.parallel import World
from plainllama.tokens.rows import Batch, to_batch
from plainllama.training import log, optim
from plainllama.training.engine import Engine
from plainllama.weights.adapters import initialise

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device is visible; the suite hides them unless CUDA_VISIBLE_DEVICES says which")
CONFIG = ModelConfig(n_layer=4, n_head=8, n_kv_head=4, d_model=512, d_ff=1024, vocab_size=4096,
                     block_size=512)
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]  # never the whole T x T matrix


def build(dtype: torch.dtype, factor: float = 1.0) -> LLaMA:
    """A model on the GPU, its matrices multiplied by `factor` so that attention matters."""
    world = World(0, 1, "cuda")
    with torch.device("meta"):
        model = LLaMA(CONFIG)
    world.place(model, dtype)
    initialise(model, 0, world.piece)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor if p.dim() > 1 else 1.0)
    return model


def ids(rows: int = 4, length: int = 513) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(CONFIG.vocab_size, (rows, length), generator=generator).cuda()


def mean_loss(model: LLaMA, x: torch.Tensor) -> torch.Tensor:
    return model(x[:, :-1], x[:, 1:]) / x[:, 1:].numel()


def heads(n: int, dtype=torch.bfloat16, grad: bool = False) -> torch.Tensor:
    return torch.randn(2, n, 512, 64, device="cuda", dtype=dtype, requires_grad=grad)


def update(model: LLaMA, optimizer, x: torch.Tensor, rate: float = 1e-3) -> float:
    loss = mean_loss(model, x)
    loss.backward()
    optim.step(optimizer, rate, World(0, 1, "cuda").square_norm(model).sqrt(), 1.0)
    optimizer.zero_grad()
    return loss.item()


def test_cuda_computes_what_the_cpu_computes():
    model, x = build(torch.float32, 3.0), ids(2, 128)
    there = model(x)
    model.to("cpu")
    here = model(x.cpu())
    assert (there.cpu() - here).abs().max() <= 1e-4 * here.abs().max()


@torch.no_grad()
def test_bf16_logits_stay_close_to_fp32():
    exact, rounded, x = build(torch.float32, 3.0), build(torch.bfloat16, 3.0), ids()
    a, b = exact(x[:, :-1]), rounded(x[:, :-1])
    assert b.dtype == torch.bfloat16
    assert F.cosine_similarity(a.flatten(), b.float().flatten(), dim=0) > 0.999
    assert mean_loss(rounded, x).item() == pytest.approx(mean_loss(exact, x).item(), rel=0.01)


@pytest.mark.parametrize("kv", [8, 2])
def test_sdpa_can_run_fused_and_equals_the_reference(kv):
    q, k, v = heads(8), heads(kv), heads(kv)
    with sdpa_kernel(FUSED):  # an error if neither kernel takes these inputs
        fused = attend(q, k, v, "sdpa")
    exact = attend(q.float(), k.float(), v.float(), "reference")
    assert (fused.float() - exact).norm() < 1e-2 * exact.norm()


def test_a_flash_kernel_is_the_one_that_runs():
    from torch.profiler import ProfilerActivity, profile

    model, x = build(torch.bfloat16), ids()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        mean_loss(model, x).backward()
        torch.cuda.synchronize()
    names = [event.name for event in seen.events() if event.device_type.name == "CUDA"]
    if not names:
        pytest.skip("the profiler sees no kernels on this machine")
    flash = [name for name in names if "flash" in name.lower() or "cudnn" in name.lower()]
    backward = [name for name in flash if "bwd" in name.lower() or "bprop" in name.lower()]
    assert len(flash) > len(backward) >= CONFIG.n_layer, sorted(set(names))


def test_eager_and_compiled_agree_in_fp32():
    eager, compiled, x = build(torch.float32, 3.0), build(torch.float32, 3.0), ids()
    compiled.compile()
    losses = [mean_loss(model, x) for model in (eager, compiled)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    others = dict(compiled.named_parameters())
    for name, p in eager.named_parameters():
        assert (p.grad - others[name].grad).norm() <= 1e-3 * p.grad.norm(), name


def test_training_in_bf16_lowers_the_loss_and_counts_its_memory():
    torch.cuda.reset_peak_memory_stats()
    model, x = build(torch.bfloat16), ids()
    optimizer = optim.make(model, settings.Settings())
    losses = [update(model, optimizer, x) for _ in range(6)]
    assert losses[0] == pytest.approx(math.log(CONFIG.vocab_size), abs=0.1)
    assert losses[1] < losses[0] and losses[-1] < losses[0] - 0.2
    weights = sum(p.numel() for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert log.peak_memory(torch.device("cuda")) >= 16 * weights  # weights, gradients, moments


def test_the_fused_optimizer_clips_and_skips_on_the_gpu():
    model = build(torch.float32)
    optimizer = optim.make(model, settings.Settings())
    before = [p.detach().clone() for p in model.parameters()]
    mean_loss(model, ids()).backward()
    optim.step(optimizer, 1e-3, torch.tensor(math.nan, device="cuda"), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(not state["exp_avg"].any() for state in optimizer.state.values())
    grads = [p.grad.clone() for p in model.parameters()]
    optim.step(optimizer, 1e-3, torch.tensor(4.0, device="cuda"), 1.0)  # divides gradients by 4
    for grad, p in zip(grads, model.parameters(), strict=True):
        first = optimizer.state[p]["exp_avg"]  # (1 - beta1) * clipped gradient
        assert torch.allclose(first, 0.1 * grad / 4, rtol=1e-4, atol=1e-9)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_xformers_equals_sdpa():
    pytest.importorskip("xformers.ops")
    inputs = [heads(n, grad=True) for n in (8, 4, 4)]
    outcomes = []
    for backend in ("sdpa", "xformers"):
        y = attend(*inputs, backend)
        outcomes.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    for a, b in zip(*outcomes, strict=True):
        assert (a.float() - b.float()).norm() < 2e-2 * a.float().norm()


def test_greedy_texts_with_a_cache_are_those_without():
    model, prompts = build(torch.float32, 3.0).eval(), [[5, 6, 7], [8] * 20]
    made = generate.generate(model, prompts, 12, settings.Sampling(temperature=0.0), [0, 0])
    for prompt, (new, ended) in zip(prompts, made, strict=True):
        text = torch.tensor([prompt + new]).cuda()
        with torch.no_grad():
            likeliest = model(text)[0, len(prompt) - 1:-1].argmax(-1)
        assert ended == "length" and likeliest.tolist() == new


@pytest.mark.parametrize("sampling", [settings.Sampling(temperature=0),
                                      settings.Sampling(top_p=0.9)])
def test_decoding_never_waits_for_a_token(monkeypatch, sampling):
    """Tokens come by copies of their own, which the host looks at a step late."""
    model, real = build(torch.bfloat16).eval(), generate.Batch

    class Strict(real):
        def draw(self, *words):
            torch.cuda.set_sync_debug_mode("error")
            try:
                super().draw(*words)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        def advance(self):
            torch.cuda.set_sync_debug_mode("error")
            try:
                super().advance()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    want = generate.generate(model, [[5, 6, 7], [8] * 20], 24, sampling, [0, 1])
    monkeypatch.setattr(generate, "Batch", Strict)
    assert generate.generate(model, [[5, 6, 7], [8] * 20], 24, sampling, [0, 1]) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_decoding_is_that_without_a_cache(dtype):
    """Also when its cache and its graph are used again, for fewer prompts of other lengths. In
    bf16 a token may differ where two are nearly as likely."""
    model = build(dtype, 3.0).eval()
    compiled = generate.compile_step(model, 3, 64, must=True)
    for prompts in ([[5, 6, 7], [8] * 20, [9]], [[11, 12]], [[13] * 40, [14]]):
        made = generate.generate(model, prompts, 24, settings.Sampling(temperature=0),
                                 [0] * len(prompts), compiled=compiled)
        for prompt, (new, ended) in zip(prompts, made, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + new]).cuda())[0, len(prompt) - 1:-1].float()
            chosen = logits.gather(1, torch.tensor(new).cuda()[:, None])[:, 0]
            slack = 0 if dtype == torch.float32 else 0.05 * logits.abs().max()
            assert ended == "length" and (logits.amax(-1) - chosen <= slack).all()


def test_stopped_and_resumed_equals_never_stopped(tmp_path):
    texts = some_documents(60)
    write_data_set(tmp_path / "data" / "toy", {"train": texts, "val": texts[5:9]})
    (tmp_path / "toy.py").write_text(TOY)
    words = ("train.py", "toy.py", "--device=cuda", "--dtype=fp32", "--compile=false")
    assert run_script(*words, "--out_dir=out/whole", cwd=tmp_path).returncode == 0
    stopped = run_script(*words, "--out_dir=out/parts", "--max_minutes=1e-9", cwd=tmp_path)
    assert stopped.returncode == 75, stopped.stderr
    resumed = run_script(*words, "--out_dir=out/parts", cwd=tmp_path)
    assert resumed.returncode == 0 and "resuming from" in resumed.stdout, resumed.stderr
    whole, parts = (load_file(tmp_path / "out" / name / "checkpoints/step_40/model.safetensors")
                    for name in ("whole", "parts"))
    for name, value in whole.items():
        assert (parts[name] - value).norm() <= 1e-3 * value.norm(), name


def test_a_deterministic_run_gives_the_same_bits(tmp_path):
    texts = some_documents(60)
    write_data_set(tmp_path / "data" / "toy", {"train": texts, "val": texts[5:9]})
    (tmp_path / "toy.py").write_text(TOY)
    for name in ("one", "two"):  # with evaluations and samples, which draw
        done = run_script("train.py", "toy.py", "--device=cuda", "--dtype=fp32", "--deterministic",
                          "--compile=false", "--max_steps=6", f"--out_dir=out/{name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / "out" / name / "checkpoints/step_6/model.safetensors")
                for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_offload_takes_weights_and_moments_off_the_gpu(tmp_path):
    """One process with offload trains as one without, in less than half of the GPU's memory. The
    processes are fresh: each has a peak of its own."""
    texts = some_documents(60)
    write_data_set(tmp_path / "data" / "toy", {"train": texts, "val": texts[5:9]})
    (tmp_path / "toy.py").write_text(TOY)
    # a block is a sixth of the weights; two micro-batches a step
    words = ("train.py", "toy.py", "--device=cuda", "--dtype=fp32", "--compile=false",
             "--n_layer=6", "--n_head=12", "--n_kv_head=4", "--d_model=768", "--d_ff=2048",
             "--max_steps=6", "--learning_rate=1e-3")
    for name, how in (("plain", ()), ("offload", ("--parallel=fsdp", "--offload"))):
        done = run_script(*words, *how, f"--out_dir=out/{name}", cwd=tmp_path, fresh=True,
                          processes=len(how[:1]))
        assert done.returncode == 0, done.stderr
    runs = [tmp_path / "out" / name for name in ("plain", "offload")]
    plain, offload = ([row for row in metrics(run) if "loss" in row] for run in runs)
    for a, b in zip(plain, offload, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4), a["step"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3), a["step"]
    whole, parts = (load_file(run / "checkpoints/step_6/model.safetensors") for run in runs)
    for name, value in whole.items():
        assert (parts[name] - value).norm() <= 1e-3 * value.norm(), name
    total = sum(value.numel() for value in whole.values())
    assert plain[-1]["peak_memory_bytes"] >= 16 * total  # weights, gradients, two moments
    assert offload[-1]["peak_memory_bytes"] < 8 * total


# ---- the engine

def made(**keys) -> Engine:
    base = dict(n_layer=4, n_head=8, n_kv_head=4, d_model=512, d_ff=1024, vocab_size=4096,
                block_size=512, global_batch_tokens=8 * 512, micro_batch=4, device="cuda",
                compile="false", max_steps=10)
    return Engine(settings.Settings(**(base | keys)), World(0, 1, "cuda"), bos_id=1)


TARGETS = 8 * 512


def pinned(documents: bool = False) -> Batch:
    x = ids(8).cpu()
    x[x % 97 == 0] = 1  # documents begin
    return to_batch(x.numpy(), bos_id=1 if documents else None).pinned()


@pytest.mark.parametrize("keys", [{}, {"optimizer": "muon"}, {"dtype": "fp16"},
                                  {"activation_checkpointing": True},
                                  {"attention": "varlen", "doc_mask": True}, {"doc_mask": True},
                                  {"expand": "concat", "expand_blocks": 2},
                                  {"expand": "hybrid", "expand_blocks": 2,
                                   "expand_merge": "dlerp", "divergence_weight": 1.0}])
def test_an_update_never_waits_for_the_host(keys):
    """Copies are asynchronous, and nothing on the device is read."""
    engine, batch = made(**keys), pinned("doc_mask" in keys)
    first = engine.update(batch, 1e-3, TARGETS)  # allocates
    assert all(part.ids.is_pinned() for part in batch.split(4))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = [engine.update(batch, 1e-3, TARGETS) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats[-1][0] < first[0]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kv", [8, 2])
def test_varlen_equals_the_reference(kv, documents):
    inputs = [heads(n, grad=True) for n in (8, kv, kv)]
    where = document_bounds(pinned(True).starts[:2]).cuda() if documents else None
    y = attend(*inputs, "varlen", documents=where)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    z = attend(*exact, "reference", documents=where)
    found = [y, *torch.autograd.grad(y.float().square().sum(), inputs)]
    wanted = [z, *torch.autograd.grad(z.square().sum(), exact)]
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b).norm() < 2e-2 * b.norm()


def test_varlen_without_grouped_heads_is_the_same(monkeypatch):
    q, k, v = heads(8), heads(2), heads(2)
    grouped = attend(q, k, v, "varlen")
    monkeypatch.setattr(model, "VARLEN_GROUPS", False)  # as in torch 2.11
    assert (attend(q, k, v, "varlen") - grouped).abs().max() < 1e-2


def test_the_largest_micro_batch_fits_and_is_kept():
    engine = made(micro_batch=0, global_batch_tokens=64 * 512)
    assert engine.micro * engine.accumulate >= 64
    engine.update(to_batch(ids(64).cpu().numpy()), 1e-3, 64 * 512)
    assert torch.cuda.max_memory_allocated() < torch.cuda.get_device_properties(0).total_memory


def test_out_of_memory_halves_the_micro_batch(capsys):
    engine, batch = made(micro_batch=8), pinned()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # of the tests before
    engine.update(batch, 0.0, TARGETS)
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = 0.8 * torch.cuda.max_memory_allocated() + torch.cuda.memory_allocated() * 0.2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        engine.update(batch, 0.0, TARGETS)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.micro < 8 and "out of memory with micro-batches of 8" in capsys.readouterr().out


def test_the_loss_in_chunks_saves_memory_and_is_the_same(monkeypatch):
    losses, peaks = [], []
    for size in (1 << 40, 1 << 22):
        monkeypatch.setattr("model.LOGITS_BYTES", size)
        engine = made(dtype="fp32")
        torch.cuda.reset_peak_memory_stats()
        losses.append(engine.update(pinned(), 0.0, TARGETS).tolist()[:2])
        peaks.append(torch.cuda.max_memory_allocated())
        del engine
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and peaks[1] < peaks[0]


def test_fp16_with_its_scaler_learns():
    engine, batch = made(dtype="fp16"), pinned()
    losses = [engine.update(batch, 1e-3, TARGETS)[0].item() for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1 * 8 * 512 and engine.optimizer.scale_state()[0] >= 1
