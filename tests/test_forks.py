"""What a course may change: patches of few lines, each applied to a copy, which then runs."""

import json
import re
import shutil
import subprocess
import sys

from conftest import ROOT
from test_rl import QUICK, rows_of

DAPO = r"""rl.py
     clip_eps: float = 0.2  # ppo, grpo: of the probability ratio
+    clip_eps_high: float = 0.28  # likewise, upwards
+    tries: int = 8  # rollouts of a step at most, until all its groups are informative
-def clipped(logp, old_logp, advantage, clip_eps: float) -> torch.Tensor:
+def clipped(logp, old_logp, advantage, clip_eps: float, high: float) -> torch.Tensor:
-    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantage)
+    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_eps, 1 + high) * advantage)
-        loss = clipped(logp, batch.old_logp, batch.advantage, cfg.clip_eps)
+        loss = clipped(logp, batch.old_logp, batch.advantage, cfg.clip_eps, cfg.clip_eps_high)
-            off = ((logp.detach() - batch.old_logp).exp() - 1).abs() * batch.mask
-            seen.append(torch.stack(((off > cfg.clip_eps).sum(), batch.mask.sum(), off.max())))
+            off = ((logp.detach() - batch.old_logp).exp() - 1) * batch.mask
+            out = (off > cfg.clip_eps_high) | (off < -cfg.clip_eps)
+            seen.append(torch.stack((out.sum(), batch.mask.sum(), off.abs().max())))
-                picked = pick_prompts(len(train), step, cfg.prompts_per_step, cfg.seed)
-                asked = [train[i] for i in picked for _ in range(cfg.group_size)]
-                rows, seconds = roll_out(model, asked, (cfg.seed, "rollout", step),
-                                         cfg.temperature, cfg.top_p, cfg.task, lab)
+                groups, seconds, n = [], {}, cfg.prompts_per_step
+                for place in range(step * cfg.tries, (step + 1) * cfg.tries):
+                    picked = pick_prompts(len(train), place, n, cfg.seed)
+                    asked = [train[i] for i in picked for _ in range(cfg.group_size)]
+                    rows, took = roll_out(model, asked, (cfg.seed, "rollout", place),
+                                          cfg.temperature, cfg.top_p, cfg.task, lab)
+                    seconds = {name: seconds.get(name, 0) + took[name] for name in took}
+                    groups += zip(*[iter(rows)] * cfg.group_size)
+                    groups.sort(key=lambda group: len({row.score.reward for row in group}) == 1)
+                    if len({row.score.reward for row in groups[n - 1]}) > 1:
+                        break
+                rows = [row for group in groups[:n] for row in group]
"""
CURRICULUM = r"""rl.py
-        step, evaluations = 0, []
+        step, evaluations, rates = 0, [], {}
             step, evaluations = state["step"], state["evaluations"]
+            rates = state["rates"]  # question -> how many of its last completions were right
-                      "evaluations": evaluations})
+                      "evaluations": evaluations, "rates": rates})
-                picked = pick_prompts(len(train), step, cfg.prompts_per_step, cfg.seed)
+                order = pick_prompts(len(train), step, len(train), cfg.seed)
+                order.sort(key=lambda i: rates.get(i) in (0, 1))  # all alike: at the end
+                picked = order[: cfg.prompts_per_step]
                 rows, seconds = roll_out(model, asked, (cfg.seed, "rollout", step),
                                          cfg.temperature, cfg.top_p, cfg.task, lab)
+                reward = np.reshape([row.score.reward for row in rows], (-1, cfg.group_size))
+                rates |= zip(picked, reward.mean(axis=1).tolist())
-                metrics = learn(rows, step, policy, critic, reference, lab)
+                metrics = {"asked": picked} | learn(rows, step, policy, critic, reference, lab)
"""
FORMAT = r"""verify.py
-FORMATS = ("tinygsm", "omi1", "text")
+FORMATS = ("tinygsm", "omi1", "json", "text")
+JSON = re.compile(r'\{.*"answer": *"?([^"{}]+)"?\}')
-    return "text", None
+    return ("json" if JSON.search(completion) else "text"), None
     boxed = BOX.findall(text)
+    if found := JSON.search(text):
+        return found[1], ""
"""
SCRIPT = """
import sys, rl
right = sys.argv.pop(1)
rl.VERIFIERS["toy"] = lambda texts, golds, limit: rl.score_batch(
    [right % gold if i % 2 or gold in "02468" else text
     for i, (text, gold) in enumerate(zip(texts, golds))], golds, limit)
rl.launch(rl.main, rl.Config, rl.PRESETS)
"""


def forked(folder, base, patch: str, right="\\boxed{%s}", **flags) -> list[dict]:
    """The training rows and the last evaluation of a copy whose lines (" ", "-") became (" ", "+").
    Of its questions 0 to 8 the even ones are always answered right, the others every second time.
    """
    assert len(re.findall(r"^[+-]", patch, re.M)) <= 40
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "out"), dirs_exist_ok=True)
    file = folder / patch.partition("\n")[0]
    text = file.read_text("utf-8")
    for change in re.findall(r"(?:^[ -].*\n)+(?:^\+.*\n)+", patch, re.M):
        old, new = (re.sub(rf"^[{sign}].*\n|^.", "", change, flags=re.M) for sign in "+-")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text, "utf-8")
    rows = [{"question": f"{i}?", "answer": i} for i in range(10)]  # and the last is held out
    (folder / "questions.json").write_text(json.dumps(rows))
    flags = {**QUICK, "init_from": base, "questions": "questions.json", "out_dir": "run", **flags}
    command = [sys.executable, "-c", SCRIPT, right, *(f"--{k}={v}" for k, v in flags.items())]
    subprocess.run(command, cwd=folder, check=True)
    *rows, last = rows_of(folder / "run")
    return [*(row for row in rows if row["kind"] == "train"), last]


def test_dynamic_sampling_and_a_higher_upper_clip_are_a_short_fork(base, tmp_path):
    *trained, _ = forked(tmp_path, base, DAPO, clip_eps=0.999, clip_eps_high=1e-9)
    assert [row["informative"] for row in trained] == [1, 1, 1]
    assert all(0 < row["clip_fraction"] < 1 for row in trained)
    clip = "import torch, rl; new, r = torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0])\n"
    clip += "print(rl.clipped(new, new * 0, r, 0.1, 0.3).tolist())"
    found = subprocess.check_output([sys.executable, "-c", clip], cwd=tmp_path, text=True)
    assert [round(loss, 4) for loss in json.loads(found)] == [-1.3, 0.9]


def test_a_curriculum_that_leaves_what_is_solved_is_a_short_fork(base, tmp_path):
    *trained, _ = forked(tmp_path, base, CURRICULUM)
    asked = [i for row in trained for i in row["asked"]]
    assert len(asked) == 12 and all(asked.count(solved) <= 1 for solved in range(0, 9, 2))


def test_a_format_with_a_share_of_its_own_is_a_short_fork(base, tmp_path):
    *trained, last = forked(tmp_path, base, FORMAT, '{"answer": %s}', algo="grpo")
    found = last["sampled_formats"]["json"]
    assert found["accuracy"] == 1 and found["share"] == last["sampled_pass@1"]
    assert all(row["share_json"] == row["reward"] > 0 for row in trained)
    assert (tmp_path / "run" / "echo.png").exists()
