"""claims.py: the grid, what is made once, what survives a kill, verdicts, the study's commands."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

import claims
import pretrain
import rl
import runs

TINY = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(claims.RECORD.parent)!r})
import claims
from runs import base, tune

BASE = base(width=32, heads=2, layers=2, max_steps=8, save_every=2, log_every=2, eval_every=8)
ONE = tune(BASE, n=8, prompts_per_step=4, max_new_tokens=8, max_steps=3, save_every=1)
CLAIMS = {{
    "yes": claims.Claim("a", "b", {{"one": ONE}}, ["greedy"], lambda x: True),
    "no": claims.Claim("a", "b", {{"one": ONE, "again": tune(ONE, "eval", n=8)}},
                       ["greedy", "tinygsm steps"], lambda x: x["one"]["greedy"] > 100),
}}
claims.CLAIMS, claims.RECORD = CLAIMS, Path("record.json")
if __name__ == "__main__":
    claims.main(sys.argv[1:])
"""


def start(folder, *words):
    folder.mkdir(exist_ok=True)
    (folder / "tiny.py").write_text(TINY)
    command = [sys.executable, "tiny.py", *words, "--seeds=1", "--jobs=1"]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE)


def figures(folder) -> dict:
    record = json.loads((folder / "record.json").read_text())
    return {name: {**figures, "minutes": 0} for name, figures in record.items()}


def test_a_killed_study_continues_and_a_finished_one_makes_nothing(tmp_path):
    whole, torn = start(tmp_path / "a", "all"), start(tmp_path / "b", "all")
    while not list(tmp_path.glob("b/out/claims/ppo-*-0/ckpt.pt")):
        assert torn.poll() is None
        time.sleep(0.02)
    torn.send_signal(signal.SIGKILL)
    text = whole.communicate()[0]
    assert "holds in 1 of 1" in text and "holds in 0 of 1" in text and "(False)" in text
    assert start(tmp_path / "b", "all").wait() == 0
    assert figures(tmp_path / "a") == figures(tmp_path / "b")
    assert sorted(re.sub("-.*", "", name) for name in figures(tmp_path / "a")) == [
        "eval", "ppo", "pretrain"]  # two claims share them

    made = {path: path.stat().st_mtime for path in tmp_path.glob("a/out/claims/*/*")}
    again = start(tmp_path / "a", "all").communicate()[0]
    assert again == text and made == {path: path.stat().st_mtime for path in made}


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_every_run_of_a_claim_here_and_at_scale_is_one_of_the_scripts(name):
    for leaf in claims.CLAIMS[name].runs.values():
        for run in leaf.family():
            if run.script == "losses":
                continue
            for scaled in (run, claims.at_scale(run)):
                script = {"pretrain": pretrain, "rl": rl}[run.script]
                cfg = pretrain.parse_config(script.Config, script.PRESETS, scaled.argv(0))
                pretrain.check_ranges(cfg)
                assert run.script == "pretrain" or rl.check(cfg) is None
                assert ("toy" in " ".join(scaled.argv(0))) == (scaled is run)


def test_claims_share_their_runs():
    leaves = [run for claim in claims.CLAIMS.values() for run in claim.runs.values()]
    assert len({run.name(0) for run in leaves}) == len(set(leaves)) < len(leaves)
    assert leaves.count(claims.PPO) >= 4


def test_a_reward_by_lot_says_nothing_but_the_format():
    scores = runs.by_lot(["The answer is \\boxed{1}."] * 1000, ["1"] * 1000, 1.0)
    assert {score.format for score in scores} == {"text"}
    assert 340 < sum(score.reward for score in scores) < 460
