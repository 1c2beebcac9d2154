"""Tables of the study: means with intervals, paired differences, tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from paired import holm, interval, sign_flip_p
from runs import Cell

ROUNDS = (5, 15)
REFERENCES = ("FedAvg, extra steps", "replay", "replay + contrastive", "lowrank")
"""Methods that every other one is compared with."""


class Results:
    """What the runs came to.

    Args:
        rows: from `run_cell`.
    """

    def __init__(self, rows: Sequence[dict[str, object]]) -> None:
        self._rows = {Cell(*(row[k] for k in ("setting", "method", "fold", "seed"))): row for row in rows}
        self._pairs = sorted({(cell.seed, cell.fold) for cell in self._rows})
        self._methods = list(dict.fromkeys(cell.method for cell in self._rows))

    def values(self, setting: str, method: str, round_number: int) -> np.ndarray:
        """Accuracy of every pair [n], in the order of seeds and folds; empty where there are no runs."""
        found = [self._rows.get(Cell(setting, method, fold, seed)) for seed, fold in self._pairs]
        return np.array([row["accuracy"][round_number - 1] for row in found if row is not None])

    def _bytes_up(self, setting: str, method: str) -> float:
        """Mean megabytes that a round's clients send."""
        found = [r["bytes_up"] for c, r in self._rows.items() if (c.setting, c.method) == (setting, method)]
        return float(np.mean(found)) / 1e6

    def _rounds_to(self, setting: str, method: str, share: float = 0.9) -> str:
        """The first round whose mean accuracy reaches a share of the centralised one's last."""
        central = self.values(setting, "centralised", ROUNDS[-1])
        if not len(central):
            return "?"
        goal = share * central.mean()
        reached = [n for n in range(1, ROUNDS[-1] + 1) if self.values(setting, method, n).mean() >= goal]
        return str(reached[0]) if reached else "-"

    def table(self, setting: str) -> str:
        """Mean and 95 % interval of every method, and paired differences to the references at the last round."""
        references = [name for name in REFERENCES if len(self.values(setting, name, ROUNDS[-1]))]
        against = "".join(f" − {name} |" for name in references)
        lines = [
            f"**{setting}**\n",
            f"| method | round {ROUNDS[0]} | round {ROUNDS[1]} |{against} rounds to 90 % | MB up |",
            "|" + "---|" * (5 + len(references)),
        ]
        for method in self._methods:
            last = self.values(setting, method, ROUNDS[-1])
            if not len(last):
                continue
            columns = [f"{self.values(setting, method, ROUNDS[0]).mean():.1f}"]
            columns += ["{:.1f} ({:.1f} … {:.1f})".format(last.mean(), *interval(last))]
            for reference in references:
                other = self.values(setting, reference, ROUNDS[-1])
                columns.append("" if reference == method else f"{(last - other).mean():+.1f}")
            columns += [self._rounds_to(setting, method), f"{self._bytes_up(setting, method):.1f}"]
            lines.append(f"| {method} | {' | '.join(columns)} |")
        return "\n".join(lines)

    def tests(self, settings: Sequence[str], comparisons: Sequence[tuple[str, str]], rounds: Sequence[int]) -> str:
        """Every comparison of a family, with Holm's correction over all of them, whether they were run or not."""
        family = [(s, a, b, n) for s in settings for a, b in comparisons for n in rounds]
        run = [key for key in family if len(self.values(key[0], key[1], 1)) and len(self.values(key[0], key[2], 1))]
        found = [(key, self.values(key[0], key[1], key[3]) - self.values(key[0], key[2], key[3])) for key in run]
        p = np.array([sign_flip_p(difference) for _, difference in found] + [1.0] * (len(family) - len(run)))
        lines = [
            f"{len(family)} comparisons ({len(run)} of them run), {len(self._pairs)} pairs each; "
            "exact sign-flip tests, Holm-corrected.\n",
            "| setting | comparison | round | difference | 95 % interval | p | p, Holm |",
            "|---|---|---|---|---|---|---|",
        ]
        for (key, difference), raw, adjusted in zip(found, p, holm(p), strict=False):
            low, high = interval(difference)
            mark = "**" if adjusted < 0.05 else ""
            lines.append(
                f"| {key[0]} | {key[1]} − {key[2]} | {key[3]} | {mark}{difference.mean():+.1f}{mark} | "
                f"{low:+.1f} … {high:+.1f} | {raw:.2g} | {mark}{adjusted:.2g}{mark} |"
            )
        return "\n".join(lines)
