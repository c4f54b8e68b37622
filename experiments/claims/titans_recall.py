"""Recall of pairs that no window of attention reaches any more: Titans beside its parts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.cells import START
from experiments.claims.registry import Claim, Outcome
from experiments.training import ModelOptions, Trainer, TrainOptions, step_key
from jattn.mechanisms.entry import Paper
from jattn.models import Swap
from jattn.tasks.mqar import Mqar

LENGTH, VOCABULARY, PAIRS = 64, 128, 4
WINDOW = 8
STAGES = ((32, 0.01, 300, 64), (LENGTH, 1.0, 200, 32))
"""Length, spread of the queries, steps and rows a step of each part of the training; the last is judged."""
SEED = 0
LINEAR = {"linear": True, "theta_max": 0.5}
"""A memory of one matrix, whose steps may overwrite what a key had stored. One of two did not learn this in time."""
PARTS: dict[str, Any] = {"num_persistent": WINDOW, "chunk_size": WINDOW, "memory_options": LINEAR}
MIXERS = {
    "full attention": Swap("softmax_attention"),
    "window": Swap("softmax_attention", {"local_window_size": (WINDOW - 1, 0)}),
    "memory alone": Swap("NeuralMemory", {"chunk_size": WINDOW, **LINEAR}),
    "MAC": Swap("TitansMAC", {"segment": WINDOW, **PARTS}),
    "MAG": Swap("TitansMAG", {"window": WINDOW, **PARTS}),
    "MAL": Swap("TitansMAL", {"window": WINDOW, **PARTS}),
}
TITANS = ("MAC", "MAG", "MAL")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByDistance(Mqar):
    """Recall judged only where the value lies from `least` to `most` tokens back; training asks for all."""

    least: int = 0
    most: int = LENGTH

    def examples(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of an evaluation set."""
        batch = super().examples(split, indices)
        back = distances(batch["inputs"], self.num_kv_pairs)
        inside = (self.least <= back) & (back <= self.most)
        return batch | {"weights": np.where(inside, batch["weights"], 0).astype(np.float32)}


def distances(inputs: np.ndarray, pairs: int) -> np.ndarray:
    """How far back from each token the value of its key lies, if it repeats one of the pairs' keys; otherwise -1.

    Example:
        >>> distances(np.array([[1, 9, 2, 8, 0, 2, 0, 1]]), 2).tolist()
        [[-1, -1, -1, -1, -1, 2, -1, 6]]
    """
    keys = inputs[:, 0 : 2 * pairs : 2]
    same = inputs[:, :, None] == keys[:, None, :]
    back = np.arange(inputs.shape[1])[:, None] - (2 * np.arange(pairs) + 1)
    behind = same & (np.arange(inputs.shape[1])[:, None] >= 2 * pairs)
    return np.where(behind.any(-1), np.where(behind, back, 0).sum(-1), -1)


def options(mixer: str) -> ModelOptions:
    """A short convolution first, so that pairs are bound alike in all models; then the mixer."""
    attention = Swap("BaseConv", layers=[0]), Swap(MIXERS[mixer].name, MIXERS[mixer].options, layers=[1])
    return ModelOptions(attention=attention, width=64, depth=2, num_heads=2, mlp_ratio=0.0, **START)


def task(length: int, spread: float, least: int = 0, most: int = LENGTH) -> ByDistance:
    """Queries behind the pairs, judged at some distances."""
    sizes = {"seq_len": length, "vocab_size": VOCABULARY, "num_kv_pairs": PAIRS, "power_a": spread}
    return ByDistance(**sizes, seed=SEED, least=least, most=most)


def train(mixer: str, quick: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Train one mixer: its accuracies within and beyond the window, and losses."""
    counts, model = [3 if quick else count for _, _, count, _ in STAGES], options(mixer)
    judged = STAGES[-1][:2]
    # The last task gives the model its length.
    trainer = Trainer(task(*judged), model, TrainOptions(sum(counts), STAGES[0][-1], learning_rate=5e-3))
    state, curve, number = trainer.init(SEED), [], 0
    for (length, spread, _, rows), count in zip(STAGES, counts, strict=True):
        seen = task(length, spread)
        for _ in range(count):
            state, stats = trainer.step(state, seen.batch("train", number, rows), step_key(SEED, number))
            number += 1
            if number % 25 == 0:
                curve.append({"step": number, "loss": float(stats["loss"])})
                if number % 100 == 0:
                    report(f"{mixer}: step {number}/{sum(counts)}, loss {curve[-1]['loss']:.3f}")
    accuracy = {}
    for name, (least, most) in {"within": (0, WINDOW - 1), "beyond": (WINDOW, LENGTH)}.items():
        judge_of = Trainer(task(*judged, least, most), model, trainer.options)
        accuracy[name] = float(judge_of.evaluate(state, "test", max_batches=1 if quick else None)["accuracy"])
    report(f"{mixer}: accuracy within the window {accuracy['within']:.3f}, beyond it {accuracy['beyond']:.3f}")
    return {"accuracy": accuracy, "params": trainer.num_params, "curve": curve}


def judge(beyond: Mapping[str, float]) -> str:
    """The verdict from the accuracies beyond the window."""
    above = [beyond[name] > max(0.5, beyond["window"] + 0.2) for name in TITANS]
    return "reproduced" if all(above) else "partly" if any(above) else "not reproduced"


def run(quick: bool, report: Callable[[str], None]) -> Outcome:
    found = {mixer: train(mixer, quick, report) for mixer in MIXERS}
    beyond = {mixer: figures["accuracy"]["beyond"] for mixer, figures in found.items()}
    listed = (f"{mixer} {beyond[mixer]:.3f} (within {found[mixer]['accuracy']['within']:.3f})" for mixer in MIXERS)
    reason = f"accuracy beyond the window: {', '.join(listed)}"

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for shift, name in enumerate(("within", "beyond")):
            heights = [found[mixer]["accuracy"][name] for mixer in MIXERS]
            left.bar(np.arange(len(MIXERS)) + 0.4 * shift, heights, 0.4, label=f"{name} the window")
        left.axhline(1 / PAIRS, color="gray", linestyle=":", label="some value of the row")
        left.set(xticks=np.arange(len(MIXERS)) + 0.2, ylabel="test accuracy", ylim=(0, 1.4))
        left.set_xticklabels([mixer.replace(" ", "\n") for mixer in MIXERS])
        for mixer, figures in found.items():
            right.plot([at["step"] for at in figures["curve"]], [at["loss"] for at in figures["curve"]], label=mixer)
        right.set(xlabel="step", ylabel="training loss (nats)")
        for axis in (left, right):
            axis.legend(fontsize="small")
            axis.grid(alpha=0.3)

    return Outcome(judge(beyond), reason, {"seed": SEED, "window": WINDOW, "stages": STAGES, "mixers": found}, draw)


CLAIM = Claim(
    name="titans_recall",
    paper=Paper("Titans: Learning to Memorize at Test Time", "2501.00663", 2025),
    claim="A neural memory beside attention in a window or a segment answers for what lies beyond that window.",
    setting=f"MQAR with {PAIRS} pairs at the start of {LENGTH} tokens, {VOCABULARY} words, queries spread evenly "
    "behind them; two layers without feed-forward parts, width 64, two heads, learned positions. The first layer is "
    "BaseConv of width 3 in all models, the second one the mixer: attention, attention in a window of "
    f"{WINDOW}, the memory alone (one matrix a head, chunks of {WINDOW}), and the three Titans with it, their "
    f"windows and segments {WINDOW} tokens and {WINDOW} persistent ones. 300 steps on 32 tokens with queries close "
    "behind the pairs and 64 rows a step, then 200 on the task that is judged with 32; a rate of 5e-3, one seed. "
    f"Beyond the window are queries whose value lies {WINDOW} tokens back or more. The paper's needles lie 2,000 to "
    "16,000 tokens back in text, with models of 170 to 760 million parameters.",
    expected="Beyond the window MAC, MAG and MAL each answer more than half of all queries right and 0.2 more than "
    "attention in a window: reproduced. Some of them: partly.",
    run=run,
)
