"""What runs the ops, and `torch.ops.sjd`."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sjd_engine import JacobiDecoder, SamplingParams, attention, native, ops
from sjd_engine.batch import Batch
from sjd_engine.kernels import reference
from sjd_engine.request import make_request
from sjd_engine.testing import VerifyCase, assert_same_decisions

CASE = VerifyCase("maximal", 50, 4, params=SamplingParams(guidance_scale=2.0, top_k=20), drift=0.2)


@pytest.fixture(autouse=True)
def fresh_choice():
    ops._backend.cache_clear()
    yield
    ops._backend.cache_clear()


class TestBackend:
    def test_the_compiled_module_runs_on_a_cpu(self):
        assert ops.backend("cpu").name == "cpu"

    def test_a_gpu_takes_triton(self):
        pytest.importorskip("triton")
        assert ops.backend("cuda").name == "triton"

    @pytest.mark.parametrize("name", ops.BACKENDS)
    def test_every_backend_can_be_asked_for_and_decides_alike(self, name, monkeypatch):
        expected = CASE.run(reference.verify)
        monkeypatch.setenv("SJD_BACKEND", name)
        if attention.missing(name, "cpu"):
            pytest.skip(attention.missing(name, "cpu"))
        assert ops.backend("cpu").name == name
        assert_same_decisions(expected, CASE.run(ops.verify))

    def test_an_unknown_backend_lists_the_known_ones(self, monkeypatch):
        monkeypatch.setenv("SJD_BACKEND", "cuda")
        with pytest.raises(ValueError, match=r"SJD_BACKEND.*triton, cpu, reference"):
            ops.backend("cpu")

    def test_a_backend_that_cannot_run_is_an_error_where_it_was_asked_for(self, monkeypatch):
        monkeypatch.setattr(native, "_C", None)
        monkeypatch.setenv("SJD_BACKEND", "cpu")
        with pytest.raises(RuntimeError, match="pip install"):
            ops.backend("cpu")

    def test_a_missing_module_is_told_not_hidden(self, monkeypatch):
        monkeypatch.setattr(native, "_C", None)
        with pytest.warns(RuntimeWarning, match="the slow reference runs `verify`"):
            assert ops.backend("cpu").name == "reference"


def run_op(logits, state, grid, **arguments):
    """`verify` through torch.ops.sjd, as a traced graph calls it."""
    return ops._verify_traced(logits, state, grid, **arguments)


class TestRegistered:
    def test_the_op_decides_as_the_function(self):
        assert_same_decisions(CASE.run(reference.verify), CASE.run(run_op))

    @pytest.mark.parametrize("method", ["maximal", "exact", "sjd++"])
    def test_opcheck(self, method):
        calls = []

        def record(logits, state, grid, **arguments):
            values = [getattr(state, name) for name in ops.STATE] + [getattr(grid, name) for name in ops.GRID]
            values += [arguments.get(name) for name in ops.ARGUMENTS + ops.WORDS]
            calls.append(
                [v.clone() if isinstance(v, torch.Tensor) else v for v in (logits, state.previous_logits, *values)]
            )
            return ops.verify(logits, state, grid, **arguments)

        VerifyCase(method, 20, 3, params=SamplingParams(guidance_scale=2.0)).run(record, 2)
        for arguments in calls:
            torch.library.opcheck(torch.ops.sjd.verify.default, tuple(arguments))

    def test_a_step_compiles_without_a_graph_break(self):
        compiled = torch.compile(ops.verify, fullgraph=True, backend="aot_eager")
        assert_same_decisions(CASE.run(reference.verify), CASE.run(compiled))


class NoSync(TorchDispatchMode):
    """Refuses every op that makes the host wait for the device, or sizes a tensor by data."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name in self.FORBIDDEN:
            raise AssertionError(f"host sync: {func.name()}")
        return func(*args, **(kwargs or {}))


class TestHostSyncs:
    def test_the_mode_notices_one(self):
        with NoSync(), pytest.raises(AssertionError, match="host sync"):
            torch.ones(2).amax().item()

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    @pytest.mark.parametrize("method", ["sjd", "sjd++", "maximal", "gumbel", "exact", "jacobi", "ar"])
    def test_a_decoder_pass_has_none(self, method, backend, monkeypatch):
        monkeypatch.setenv("SJD_BACKEND", backend)
        decoder = JacobiDecoder(
            batch_size=2, num_tokens=16, vocab_size=9, window_size=4, method=method, seeds=[1, 2],
            params=SamplingParams(top_k=4), init="above-sample",
        )  # fmt: skip
        for seed in range(3):
            logits = torch.randn(2, decoder.window_size, 9, generator=torch.Generator().manual_seed(seed))
            with NoSync():
                decoder.window()
                decoder.verify(logits)

    @pytest.mark.parametrize("method", ["maximal", "exact"])
    @pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
    def test_a_step_of_a_batch_has_none(self, engine_bf16, method, captured):
        """Forward, verification and rollback of three images, one of them complete and gone."""
        request = make_request(engine_bf16.model, "a red heart", method=method, num_images_per_prompt=3)
        batch = Batch(engine_bf16.model, engine_bf16.scheduler.prompts, request, 4, batch_invariant=False)
        for index in range(3):
            batch.begin(request, index)
        batch.end(1)
        rows = torch.tensor([0, 2, 4, 4])
        for parity in (0, 1, 0):
            with NoSync():
                batch._fixed_pass(rows, parity) if captured else batch.step()
        assert batch.poll()[0] >= 3
        assert batch.poll()[2] >= 3
        for row in batch.rows:
            batch.end(row)
