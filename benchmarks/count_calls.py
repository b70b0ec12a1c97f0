"""Count the functions of hookengine that one steady iteration of the bare kernel enters.

``sys.setprofile`` sees every Python call. Counted is what lies in hookengine's own files and in
the code that its dispatcher generates; torch's calls are torch's, the model's are the user's.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import hookengine_preprocess
from workloads import W0, Classifier

import hookengine
from hookengine import Runner

LIMITS = {"functions": 20, "calls": 30, "files": 6}
OWN = (str(Path(hookengine.__file__).parent), str(Path(hookengine_preprocess.__file__).parent))


def count(defaults: tuple[str, ...] = (), iteration: int = 50) -> Counter[tuple[str, str]]:
    """The calls of one iteration, by (file, function)."""
    calls: Counter[tuple[str, str]] = Counter()

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and (name.startswith(OWN) or name.startswith("<hookengine")):
            calls[Path(name).name, frame.f_code.co_qualname] += 1

    def batches() -> Any:
        """Switch the profile on for exactly one iteration: from one batch to the next."""
        for index, batch in enumerate(W0.loader(iteration + 10)):
            sys.setprofile(profile if index == iteration else None)
            yield batch

    class Loader:
        def __iter__(self) -> Any:
            return batches()

    model = Classifier(W0.net())
    with Runner(
        model,
        "work_dir/benchmarks",
        Loader(),
        optim_wrapper=W0.optimizer(model),
        train_cfg=dict(max_epochs=1),
        defaults=defaults,
    ) as runner:
        runner.train()
    sys.setprofile(None)
    for key in [key for key in calls if key[0] == Path(__file__).name]:
        del calls[key]
    return calls


def main() -> None:
    calls = count()
    for (file, function), times in sorted(calls.items()):
        print(f"{times:3d}  {file:24s} {function}")
    files = {file for file, _ in calls if not file.startswith("<")}
    found = {"functions": len(calls), "calls": calls.total(), "files": len(files)}
    for what, limit in LIMITS.items():
        verdict = "ok" if found[what] <= limit else "TOO MANY"
        print(f"{what}: {found[what]} (at most {limit}) {verdict}")
    if any(found[what] > limit for what, limit in LIMITS.items()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
