"""The search for parameters that get gradients, but that no optimizer trains."""

from __future__ import annotations

from hookengine import Runner


class UntrainedParameters:
    """Warns once of each parameter that requires and gets a gradient, and is in no optimizer.

    Only the gradients of the optimizers' parameters are set to None after a step, so those of the
    others are still there. The search takes about a microsecond per parameter. It looks at the
    first record, after twice as many iterations, and so on, but at least every 1000 iterations.
    """

    def __init__(self) -> None:
        self._due = 0
        self._known: set[str] = set()

    def check(self, runner: Runner, *, now: bool = False) -> None:
        """Search the model if it is time, or if ``now`` is true, and log a warning."""
        iteration = runner.progress.iter
        if iteration < self._due and not now:
            return
        self._due = iteration + min(iteration, 1000)
        trained = {
            id(p) for wrapper in runner.optim_wrappers.values() for p in wrapper.parameters()
        }
        found = [
            name
            for name, parameter in runner.bare_model.named_parameters()
            if parameter.grad is not None
            and parameter.requires_grad
            and id(parameter) not in trained
            and name not in self._known
        ]
        if not found:
            return
        self._known.update(found)
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        runner.logger.warning(
            f"these parameters get gradients, but are in no optimizer, so training does not change "
            f"them: {', '.join(found[:5])}{more}. Pass all parameters to the optimizer, add these "
            "with its add_param_group, or freeze them with requires_grad_(False)"
        )
