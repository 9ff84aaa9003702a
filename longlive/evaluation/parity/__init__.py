"""Parity: recompute recorded numbers with our own code and say how far off we are.

A *golden folder* holds files recorded from the published implementation:

* `NAME.safetensors` with tensors `in/...` (given) and `out/...` (to reproduce); its metadata holds JSON strings
  `config`, `weights` (role -> file), `tolerance`, and the plain words `mode` and `seed`;
* `NAME.json` with a `mode` and `cases`, each `{name, input, output}`;
* optionally `agreement.json`, which says what must agree, what must differ and why (the copy shipped here is used
  when a folder has none), and `index.json`, the list of files.

`entries.py` reads the folder, `rules.py` the agreement, `compare.py` judges numbers, `harness.py` runs the engines
named in `engines.py`. An engine is a module beside this one with `run(entry)` for tensors or `run_case(name, input)` for tables.
"""

from .entries import Case, Entry, read_folder
from .harness import Result, check_entry, check_folder, summary

__all__ = ["Case", "Entry", "Result", "check_entry", "check_folder", "read_folder", "summary"]
