import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pretrain
from conftest import ROOT, SMALL
from data import UserError
from model import GPT, GPTConfig
from pretrain import Config, Processes, parse_config, schedule

CPU = Processes(0, 1, torch.device("cpu"))


def settings(out_dir, data_dir, **changes):
    return Config(
        **{**SMALL, "out_dir": str(out_dir), "data_dir": data_dir, "max_steps": 8, **changes}
    )


def rows(folder) -> list[dict]:
    """The metric rows but for what a clock decides."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines
    ]


def weights(folder) -> dict:
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)["model"]


def assert_same_bits(left: dict, right: dict) -> None:
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# ---------------------------------------------------------------- configuration


def test_flags_take_both_spellings_and_the_types_of_their_fields():
    argv = [
        "--learning_rate=0.5",
        "--batch_size",
        "32",
        "--compile=true",
        "--tied",
        "false",
        "--mix=a:2",
    ]
    cfg = parse_config(Config, pretrain.PRESETS, argv)
    assert (cfg.learning_rate, cfg.batch_size, cfg.compile, cfg.tied, cfg.mix) == (
        0.5,
        32,
        True,
        False,
        "a:2",
    )


def test_precedence_is_dataclass_then_preset_then_file_then_flags(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"preset": "150m", "layers": 3, "width": 24, "run": {"argv": []}}))
    cfg = parse_config(Config, pretrain.PRESETS, [f"--config={file}", "--width=48"])
    assert (cfg.beta1, cfg.heads, cfg.layers, cfg.width) == (Config.beta1, 12, 3, 48)


def test_the_resolved_config_of_a_run_is_accepted_by_config(base):
    cfg = parse_config(Config, pretrain.PRESETS, [f"--config={base}/config.json"])
    assert cfg.max_steps == 6 and cfg.width == 32


@pytest.mark.parametrize("argv, message", [
    (["--learing_rate=1"], "unknown argument --learing_rate; did you mean --learning_rate"),
    (["--batch_size=many"], "--batch_size=many: a whole number"), (["--batch_size"], "needs a value"),
    (["--compile=maybe"], "true or false"), (["--dtype=float3"], "choose from auto, float32, bfloat16; did you mean float32"),
    (["--preset=150"], "did you mean 150m"), (["batch_size=3"], "unknown argument"), (["--config=none.json"], "none.json"),
])  # fmt: skip
def test_a_wrong_flag_is_one_sentence_with_the_nearest_name(argv, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_config(Config, pretrain.PRESETS, argv)
    assert "\n" not in str(raised.value)


def test_help_prints_every_field_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(Config, pretrain.PRESETS, ["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    for field in dataclasses.fields(Config):
        line = next(
            line for line in printed.splitlines() if line.strip().startswith(field.name + ":")
        )
        assert "  # " in line


@pytest.mark.parametrize("change, message", [
    (dict(batch_size=0), "--batch_size=0 must be above 0"), (dict(heads=3), "multiple of 2 x heads"),
    (dict(mix="toy-tiny"), "unknown corpus 'toy-tiny'"), (dict(mix="toy-omi1:2,toy-omi2:50%"), "not both"),
    (dict(device="tpu"), "--device=tpu cannot be used"), (dict(max_steps=9), "holds a run with another max_steps"),
    (dict(learning_rate=1.0), "learning_rate"),
])  # fmt: skip
def test_a_mistake_is_a_sentence_and_costs_no_file(base, data_dir, change, message):
    before = {file: file.read_bytes() for file in Path(base).iterdir()}
    cfg = dataclasses.replace(settings(base, data_dir, max_steps=6, init_std=0.1), **change)
    with pytest.raises(UserError, match=message):
        pretrain.main(cfg)
    assert {file: file.read_bytes() for file in Path(base).iterdir()} == before


def test_overwrite_spares_a_folder_that_is_no_run(tmp_path, data_dir):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a run's folder"):
        pretrain.main(settings(tmp_path, data_dir, overwrite=True))
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("argv", [["--batch_size=x"], ["--mix=nothing", "--out_dir=unused"]])
def test_a_mistake_prints_one_line_and_exits_with_2(argv, tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "pretrain.py", *argv], capture_output=True, text=True, cwd=tmp_path
    )
    assert (
        run.returncode == 2
        and len(run.stderr.splitlines()) == 1
        and run.stderr.startswith("pretrain.py: ")
    )
    assert not (tmp_path / "unused").exists()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("warmup", [0.0, 0.001, 0.5])
def test_the_learning_rate_is_above_zero_at_the_first_step_and_ends_at_its_floor(warmup):
    rates = [schedule((step + 1) / 100, warmup, 0.1) for step in range(100)]
    assert rates[0] > 0 and max(rates) <= 1 and rates[-1] == pytest.approx(0.1)
    assert schedule(0.7, warmup, 1.0) == 1.0


def gradient(micro_batch_size: int, processes=CPU) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(vocab_size=30, context=16, width=16, layers=1, heads=2, init_std=0.2)
    ).double()
    blocks = torch.randint(30, (6, 17))
    blocks[
        4
    ] = -1  # the padding of a last batch: were it averaged per micro-batch, splits would differ
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    pretrain.accumulate(
        ddp, blocks, micro_batch_size, 80, torch.autocast("cpu", enabled=False), processes
    )
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_the_gradient_is_the_same_for_every_way_to_split_a_batch(micro_batch_size):
    """The mean of the micro-batches' means weighs short ones too much (transformers#34191)."""
    pretrain.setup_distributed("cpu")
    for ours, whole in zip(gradient(micro_batch_size), gradient(6)):
        torch.testing.assert_close(ours, whole, atol=1e-12, rtol=1e-12)


def test_the_loss_is_the_cross_entropy_of_each_next_token(gpt):
    ids = torch.randint(50, (2, 9))
    expected = sum(
        -gpt(ids[:, :-1])[b, t].log_softmax(-1)[ids[b, t + 1]] for b in range(2) for t in range(8)
    )
    torch.testing.assert_close(pretrain.next_token_loss(gpt, ids), expected)


def test_fp32_master_weights_move_at_a_learning_rate_of_1e_6():
    """In bf16 weights an update of 1e-6 is rounded away (AReaL#1634)."""
    model = GPT(GPTConfig(vocab_size=30, context=16, width=16, layers=1, heads=2))
    before = model.embed.weight.clone()
    optimizer = torch.optim.AdamW(model.param_groups(0.0), lr=1e-6, fused=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pretrain.next_token_loss(model, torch.randint(30, (2, 9)))
    loss.backward()
    optimizer.step()
    moved = (model.embed.weight != before).float().mean()
    assert model.embed.weight.dtype == torch.float32 and moved > 0.5


def test_the_run_folder_holds_what_the_design_promises(base):
    assert {p.name for p in Path(base).iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "mixture.json",
        "ckpt.pt",
    }
    run = json.loads((Path(base) / "config.json").read_text())["run"]
    assert run.keys() == {"argv", "git_commit", "torch_version", "device", "world_size"}
    found = rows(base)
    assert [r["step"] for r in found if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert (
        set(found[-1]["loss"]) == {"toy-tinygsm", "toy-omi1", "toy-omi2"}
        and found[-1]["kind"] == "eval"
    )
    assert found[-1]["loss"]["toy-omi1"] < found[0]["loss"]  # it learns
    shares = [c["share"] for c in json.loads((Path(base) / "mixture.json").read_text()).values()]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("dies_at", [1, 4, 7])
def test_a_killed_run_continues_to_the_same_bits(tmp_path, data_dir, dies_at, monkeypatch):
    whole, killed = settings(tmp_path / "whole", data_dir), settings(tmp_path / "killed", data_dir)
    pretrain.main(whole)
    batch = pretrain.Mixture.batch

    def die(self, step):
        if step == dies_at:
            raise KeyboardInterrupt  # as abrupt as kill -9: nothing is saved on the way out
        return batch(self, step)

    monkeypatch.setattr(pretrain.Mixture, "batch", die)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(killed)
    monkeypatch.setattr(pretrain.Mixture, "batch", batch)
    pretrain.main(killed)
    assert_same_bits(weights(whole.out_dir), weights(killed.out_dir))
    assert rows(whole.out_dir) == rows(killed.out_dir)


def test_a_finished_run_says_so_and_changes_nothing(base, data_dir, capsys):
    before = (Path(base) / "metrics.jsonl").read_bytes()
    evaluation = pretrain.main(settings(base, data_dir, max_steps=6, init_std=0.1))
    assert "is finished" in capsys.readouterr().out and evaluation["step"] == 6
    assert (Path(base) / "metrics.jsonl").read_bytes() == before


def start(argv, **kwargs) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / "pretrain.py", *argv], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_exits_with_0_and_the_run_goes_on(tmp_path, data_dir, number):
    argv = [f"--{k}={v}" for k, v in {**SMALL, "out_dir": tmp_path / "run", "data_dir": data_dir, "max_steps": 3000,
                                      "save_every": 10**6, "eval_every": 10**6}.items()]  # fmt: skip
    process = start(argv)
    for line in process.stdout:
        if line.startswith("step 20/"):
            process.send_signal(number)
            break
    assert "stopped at step" in process.stdout.read() and process.wait(30) == 0
    stopped = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"]
    assert 20 <= stopped < 3000 and len(rows(tmp_path / "run")) == stopped
    process = start(argv)
    for line in process.stdout:
        if line.startswith(f"step {stopped + 1}/"):  # and not step 1
            break
    process.kill()
    assert [r["step"] for r in rows(tmp_path / "run")][: stopped + 1] == list(range(1, stopped + 2))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, data_dir, monkeypatch):
    losses, next_token_loss = [], pretrain.next_token_loss

    def diverge(model, blocks):
        losses.append(next_token_loss(model, blocks))
        return losses[-1] * (float("nan") if len(losses) == 5 else 1)

    monkeypatch.setattr(pretrain, "next_token_loss", diverge)
    with pytest.raises(UserError, match="nan at step 4"):
        pretrain.main(settings(tmp_path / "run", data_dir))
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 3


def test_a_full_disk_leaves_the_last_checkpoint_intact(tmp_path, data_dir, monkeypatch):
    save = torch.save

    def fill(state, path):
        if state["step"] > 3:
            Path(path).write_bytes(b"half of a chec")
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(UserError, match="could not be written.*make room and start again"):
        pretrain.main(settings(tmp_path / "run", data_dir))
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 3
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_corrupt_checkpoint_is_named(tmp_path, data_dir):
    pretrain.main(settings(tmp_path / "run", data_dir, max_steps=3))
    (tmp_path / "run" / "ckpt.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="ckpt.pt is not a readable checkpoint"):
        pretrain.main(settings(tmp_path / "run", data_dir, max_steps=3))


def test_a_checkpoint_of_another_architecture_is_refused(base, tmp_path):
    state = torch.load(Path(base) / "ckpt.pt", weights_only=True)
    state["gpt"]["width"] = 64
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="another architecture"):
        pretrain.load_model(tmp_path / "other.pt", "cpu")


def test_two_gloo_processes_train_as_one(tmp_path, data_dir):
    flags = [f"--{k}={v}" for k, v in {**SMALL, "data_dir": data_dir, "max_steps": 4, "init_std": 0.1,
                                       "learning_rate": 1e-3}.items()]  # fmt: skip
    for world, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
                        ROOT / "pretrain.py", *flags, f"--out_dir={folder}"], check=True, capture_output=True)  # fmt: skip
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-5)
    for left, right in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert left["step"] == right["step"] and left["kind"] == right["kind"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
