"""One forward on fake tensors that have values wherever the model's own code looks at them; nothing is folded."""

from __future__ import annotations

from .chance import Chance
from .inputs import Inputs
from .pass_for_real import pass_for_real
from .recorder import Recorder
from .run_once import Steady, fake_run, same_draws
from .stand_in import FakeModel
from .target import Target


def forward_with_values(stand_in: FakeModel, target: Target, inputs: Inputs, batch: int) -> None:
    """Run the model's forward on `inputs`, one microbatch of `batch` samples, with its code's own hooks.

    Raises
    ------
    BufferRead
        If the code looks at the values of a buffer that was built on meta.
    """
    model = stand_in.model
    recorder, chance = Recorder(model, stand_in.empty), Chance(frozenset())
    recorder.on_call = chance.reset
    for name, tensor in model.named_parameters():
        recorder.storage_of(recorder.register(tensor, "parameter", name)).weight_like = True
    for name, tensor in model.named_buffers():
        recorder.register(tensor, "buffer", name)
    with same_draws():
        fakes = inputs.map(stand_in.input)
        for name, tensor in fakes.tensors().items():
            recorder.register(tensor, "input", name)
        recorder.fake = fake_run(stand_in, recorder, batch, chance, target)
        with pass_for_real(recorder), chance.active(), recorder.watch(), Steady(recorder):
            model(*fakes.args, **fakes.kwargs)
