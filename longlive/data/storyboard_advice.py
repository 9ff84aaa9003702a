"""Advice on a storyboard by the documented prompt guide: length, paragraphs, continuity. Advice is never an error.

The guide (for the 5B model): about 300 tokens a shot, five or six paragraphs separated by blank lines, complete sentences without lists,
and descriptors that are repeated from shot to shot, because each shot's prompt is all that the model reads.
"""

from __future__ import annotations

import re

from ..core.story import Storyboard

TOKENS, SHORT, LONG = 300, 150, 480
PARAGRAPHS = (5, 6)
LIST_LINE = re.compile(r"^\s*([-*#]|\d+[.)])\s", re.MULTILINE)
SAME = re.compile(r"\bthe same (\w+)", re.IGNORECASE)
WORD = re.compile(r"[^\W\d_]{4,}")
COMMON = frozenset("with that this from into over under then there they their them through across while still very slowly camera".split())


def estimated_tokens(prompt: str) -> int:
    """About how many tokens a prompt has: words and signs, a third more for words that split."""
    return round(1.3 * len(re.findall(r"\w+|[^\w\s]", prompt)))


def paragraphs(prompt: str) -> int:
    return len([part for part in re.split(r"\n\s*\n", prompt) if part.strip()])


def advise(board: Storyboard, *, by_length: bool = True) -> list[str]:
    """What could be better, one line each, most general first. Shots are numbered from 1. Without `by_length`, tokens and paragraphs do not count."""
    prompts = [shot.prompt for shot in board.shots]
    lengths = [estimated_tokens(p) for p in prompts]
    counts = [paragraphs(p) for p in prompts]
    long = [
        _many(lengths, lambda n: n < SHORT, f"about {{}} tokens; the guide asks for roughly {TOKENS} a shot: say more"),
        _many(lengths, lambda n: n > LONG, f"about {{}} tokens; the guide asks for roughly {TOKENS} a shot, and 512 is the most that is read"),
        _many(counts, lambda n: n not in PARAGRAPHS, "paragraphs: {}; the guide asks for five or six, separated by blank lines"),
    ]
    advice = [
        *(long if by_length else []),
        _many([LIST_LINE.search(p) is not None for p in prompts], bool, "lists or headings; write complete sentences"),
    ]
    return [line for line in advice if line] + _continuity(board)


def _many(values: list, bad, text: str) -> str | None:
    """One line for all shots whose value is bad."""
    hit = [i for i, value in enumerate(values) if bad(value)]
    if not hit:
        return None
    low, high = min(values[i] for i in hit), max(values[i] for i in hit)
    return f"shot{'s' if len(hit) > 1 else ''} {_ranges(hit)}: " + text.format(low if low == high else f"{low} to {high}")


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] -> '1-3, 6'."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(r[0] + 1) if len(r) == 1 else f"{r[0] + 1}-{r[-1] + 1}" for r in runs)


def _continuity(board: Storyboard) -> list[str]:
    prompts, advice = [shot.prompt for shot in board.shots], []
    for index, prompt in enumerate(prompts):
        match = SAME.search(prompt)
        if match:
            advice.append(f"shot {index + 1}: 'the same {match.group(1)}' says nothing by itself; repeat its colour, shape and material")
    for name, text in board.meta.get("characters", {}).items():
        uses = [i for i, prompt in enumerate(prompts) if text in prompt]
        if not uses:
            advice.append(f"character {name!r} appears in no shot; write {{{name}}} in a prompt")
    for index in range(1, len(prompts)):
        if prompts[index] == prompts[index - 1]:
            advice.append(f"shots {index} and {index + 1} have the same prompt; change the action or the camera at a cut")
        elif not _words(prompts[index]) & _words(prompts[index - 1]):
            advice.append(f"shots {index} and {index + 1} share no descriptor; repeat short descriptors of what stays in the film")
    return advice


def _words(prompt: str) -> set[str]:
    return {word.lower() for word in WORD.findall(prompt)} - COMMON
