"""Foreign PyTorch files: tensors come out, nothing else does, and what asks for more is refused unopened."""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import os
import pickle
import re
import struct
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ddpm_lmk.config import EncoderUNetConfig
from ddpm_lmk.errors import CheckpointError, ResourceError, RunConflictError
from ddpm_lmk.models.encoder_unet import build_encoder
from ddpm_lmk.models.import_torch import dense, import_weights, inspect, read
from ddpm_lmk.models.state_dicts import choose, describe
from tests.cli.commands import SMOKE, run_command
from tests.reference.released_unet import random_state, released_shapes

WIDTH8 = released_shapes(8, multipliers=(1, 2))


class Gadget:
    """Unpickling one of these would write a file."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


def released_checkpoint(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A file as the released training loop writes it: counters, weights, and moments nobody asked for."""
    state = random_state(WIDTH8, dtype=torch.float32)
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(8, 2, 1, 1)}}, "param_groups": [{}]}
    torch.save(
        {"epoch": 750, "n_iter": 6000, "model_state_dict": state, "optimizer_state_dict": moments} | changes, path
    )
    return state


def rewritten(source: Path, target: Path, edit: Callable[[str, bytes], bytes], *, compression: int = 0) -> Path:
    """The archive `source` with its members edited."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, edit(info.filename, old.read(info)))
    return target


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    """What `import_weights` takes from a file, which it reads in a process of its own."""
    inspect(file)
    return dense(choose(read(file)).tensors, file)


def test_a_released_checkpoint_becomes_weights_a_run_can_start_from(packed_phantoms: Path, tmp_path: Path) -> None:
    state = released_checkpoint(tmp_path / "ema_model_epoch750_step6000.pt")
    file = tmp_path / "released.safetensors"
    result = run_command("import-weights", tmp_path / "ema_model_epoch750_step6000.pt", "--out", file)
    assert result.code == 0, result.err
    assert "released DDPM U-Net: width 8, multipliers [1, 2], 1 outputs" in result.out
    found = load_file(file)
    assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in state.items()}
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert file.stat().st_mode & 0o077 == 0

    model = (
        "model.width=8",
        "model.multipliers=[1, 2]",
        "model.heads=4",
        "model.head_dim=32",
        "model.pixel_unshuffle=1",
    )
    words = (f"data.path={packed_phantoms}", f"init.weights={file}", "train.duration=1 steps", *model)
    run = run_command("finetune", SMOKE / "finetune.yaml", "--cpu", 1, "--out", tmp_path / "run", *words)
    assert run.code == 0, run.err
    assert '"loaded": "trunk"' in (tmp_path / "run" / "run.json").read_text()


@pytest.mark.parametrize("is_old", [False, True], ids=["archive", "older form"])
def test_a_plain_state_dict_keeps_its_names_and_loses_the_prefix_of_data_parallel(tmp_path: Path, is_old: bool) -> None:
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    file = tmp_path / "densenet.pth"
    torch.save(nn.DataParallel(encoder).state_dict(), file, _use_new_zipfile_serialization=not is_old)
    found, wanted = tensors_of(file), encoder.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


GADGETS: dict[str, Callable[[Path], Gadget]] = {
    "system": lambda canary: Gadget(os.system, f"touch {canary}"),
    "eval": lambda canary: Gadget(eval, f"open({str(canary)!r}, 'w')"),
    "load": lambda canary: Gadget(torch.load, io.BytesIO(b"")),
    "mkdir": lambda canary: Gadget(os.mkdir, str(canary)),
}


@pytest.mark.parametrize("name", GADGETS)
@pytest.mark.parametrize("place", ["model_state_dict", "loss", "epoch"])
def test_code_in_any_place_is_named_and_never_runs(tmp_path: Path, name: str, place: str) -> None:
    released_checkpoint(tmp_path / "bad.pt", **{place: GADGETS[name](tmp_path / "canary")})
    with pytest.raises(CheckpointError, match="which tensors do not need") as error:
        import_weights(tmp_path / "bad.pt", tmp_path / "out.safetensors")
    assert error.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_names_are_found_in_every_protocol_of_pickle(tmp_path: Path, protocol: int) -> None:
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": Gadget(os.system, "true")}, protocol=protocol))
    with pytest.raises(CheckpointError, match="posix system"):
        inspect(tmp_path / "bad.pt")


def test_the_restricted_reader_is_the_second_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released_checkpoint(tmp_path / "bad.pt", epoch=Gadget(os.system, f"touch {tmp_path / 'canary'}"))
    monkeypatch.setattr("ddpm_lmk.models.import_torch.inspect", lambda file: None)
    with pytest.raises(CheckpointError, match="restricted reader refuses it"):
        import_weights(tmp_path / "bad.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "canary").exists()


def test_what_is_no_plain_archive_of_tensors_is_refused(tmp_path: Path) -> None:
    released_checkpoint(tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"a": torch.zeros(300)}, tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "oldcut.pt").write_bytes(old[: len(old) - 1300])
    (tmp_path / "whole.pt").unlink()
    rewritten(tmp_path / "good.pt", tmp_path / "packed.pt", lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    for name in ("cut", "empty", "oldcut", "packed", "absent"):
        with pytest.raises(CheckpointError, match=r"not a (P|p)"):
            import_weights(tmp_path / f"{name}.pt", tmp_path / "out.safetensors")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pt"] * 5


def test_tensors_beyond_the_file_or_not_dense_are_refused(tmp_path: Path) -> None:
    for name, tensor, told in (
        ("wide", torch.zeros(1).expand(1 << 20), "claim 4194304 bytes"),
        ("sparse", torch.eye(4).to_sparse(), "which tensors do not need"),
        ("number", 3.0, "no tensors by name"),
    ):
        torch.save({"model_state_dict": {"a": tensor}}, tmp_path / f"{name}.pt")
        with pytest.raises(CheckpointError, match=told):
            tensors_of(tmp_path / f"{name}.pt")


def test_a_released_network_with_a_tensor_missing_is_refused_with_its_name(tmp_path: Path) -> None:
    state = random_state(WIDTH8, dtype=torch.float32)
    del state["mid_attn.fn.norm.bias"]
    torch.save({"model_state_dict": state}, tmp_path / "short.pt")
    with pytest.raises(CheckpointError, match=r"mid_attn\.fn\.norm\.bias is missing"):
        describe(tensors_of(tmp_path / "short.pt"))


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    released_checkpoint(tmp_path / "good.pt")
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(RunConflictError):
        import_weights(tmp_path / "good.pt", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"


def saved_as_of_old(path: Path, content: object) -> Path:
    """The form of PyTorch before 1.6, which torchvision's ImageNet files have."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def test_code_in_the_older_form_is_named_and_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    file = saved_as_of_old(tmp_path / "bad.pth", {"a": torch.zeros(3), "b": Gadget(os.mkdir, str(canary))})
    with pytest.raises(CheckpointError, match="posix mkdir, which tensors do not need"):
        import_weights(file, tmp_path / "out.safetensors")
    data = file.read_bytes()
    (tmp_path / "first.pth").write_bytes(pickle.dumps(Gadget(os.mkdir, str(canary))) + data)
    with pytest.raises(CheckpointError, match="neither an archive nor the older form"):
        import_weights(tmp_path / "first.pth", tmp_path / "out.safetensors")
    assert not canary.exists()


def test_a_digest_in_the_name_is_compared(tmp_path: Path) -> None:
    file = saved_as_of_old(tmp_path / "net.pth", {"a": torch.zeros(3)})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    good, bad = tmp_path / f"net-{digest}.pth", tmp_path / "net-0123abcd.pth"
    good.write_bytes(file.read_bytes())
    bad.write_bytes(file.read_bytes())
    inspect(good)
    with pytest.raises(CheckpointError, match=f"named after digest 0123abcd, but has {digest}"):
        inspect(bad)


@pytest.mark.parametrize("encoder", ["densenet161", "resnext50", "vgg19"])
def test_published_encoders_are_recognised_also_under_old_names(encoder: Any) -> None:
    with torch.device("meta"):
        state = build_encoder(EncoderUNetConfig(encoder=encoder, in_channels=3)).state_dict()
        state["classifier.weight"] = torch.zeros(1000, 8)
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value for name, value in state.items()}
    assert describe(old)["network"] == f"{encoder} of published size, for model.kind=encoder_unet"
    del old[next(name for name in old if name.endswith(".weight"))]
    assert describe(old)["network"].startswith("unknown")


def test_a_flipped_bit_in_the_numbers_is_noticed_by_the_archive(tmp_path: Path) -> None:
    state = released_checkpoint(tmp_path / "good.pt")
    data = bytearray((tmp_path / "good.pt").read_bytes())
    needle = struct.pack("<8f", *state["time_mlp.1.weight"].flatten()[:8].tolist())
    data[data.index(needle)] ^= 1
    (tmp_path / "flipped.pt").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="checksum"):
        import_weights(tmp_path / "flipped.pt", tmp_path / "out.safetensors")


def linear(value: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 2), value), "a.bias": torch.full((2,), value)}


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


class Settings:
    """A class of the trainer's own, which is nowhere when the file is read."""

    __module__ = "their_trainer.config"

    def __init__(self) -> None:
        self.lr = 1e-4


@pytest.mark.parametrize("is_old", [False, True])
def test_numbers_and_settings_beside_weights_are_passed_over_and_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    monkeypatch.setitem(sys.modules, "their_trainer", types.ModuleType("their_trainer"))
    config = types.ModuleType("their_trainer.config")
    config.Settings = Settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_trainer.config", config)
    content = {
        "model_state_dict": linear(1),
        "best_loss": np.float64(0.5),
        "history": np.arange(3),
        "args": argparse.Namespace(lr=1, out=Path("runs")),
        "config": Settings(),
        "dtype": torch.float16,
        "milestones": collections.Counter([3]),
    }
    torch.save(content, tmp_path / "best.pt", _use_new_zipfile_serialization=not is_old)
    found = import_weights(tmp_path / "best.pt", tmp_path / "best.safetensors")
    assert found["passed_over"] == ["best_loss", "history", "args", "config", "dtype", "milestones"]
    assert load_file(tmp_path / "best.safetensors")["a.weight"].tolist() == [[1, 1], [1, 1]]


def test_names_of_python_and_pytorch_get_no_stand_in_and_the_way_out_is_named(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear Linear.*torch\.save\(model\.state_dict"):
        import_weights(tmp_path / "whole.pt", tmp_path / "out.safetensors")
    (tmp_path / "ours.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a safetensors file already"):
        import_weights(tmp_path / "ours.safetensors", tmp_path / "out.safetensors")


def test_average_beside_raw_weights_is_told_and_can_be_taken(tmp_path: Path) -> None:
    average = {"initted": torch.tensor(True), "step": torch.tensor(9), **under("ema_model.", linear(2))}
    moments = {"state": {0: {"exp_avg": torch.zeros(2)}}, "names": {"exp_avg": torch.zeros(2)}}
    torch.save({"step": 10, "model": linear(1), "opt": moments, "ema": average}, tmp_path / "m.pt")
    result = run_command("import-weights", tmp_path / "m.pt", "--out", tmp_path / "raw.safetensors")
    assert result.code == 0, result.err
    assert "taken: model\n" in result.out
    assert "also in the file: ema, 4 tensors; --take ema takes it instead" in result.out
    assert load_file(tmp_path / "raw.safetensors")["a.bias"].tolist() == [1, 1]
    result = run_command("import-weights", tmp_path / "m.pt", "--take", "ema", "--out", tmp_path / "ema.safetensors")
    assert "taken: ema, ema_model. cut off the names" in result.out
    found = load_file(tmp_path / "ema.safetensors")
    assert {name: value.flatten()[0].item() for name, value in found.items()} == {"a.weight": 2, "a.bias": 2}
    with pytest.raises(CheckpointError, match="no weights called 'teacher'; it has: model, ema"):
        choose(read(tmp_path / "m.pt"), "teacher")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.model."])
def test_prefixes_of_other_trainers_are_cut_off_and_told(prefix: str) -> None:
    chosen = choose({"state_dict": under(prefix, linear(1)), "epoch": 3, "hyper_parameters": {"lr": 1}})
    assert (chosen.name, chosen.cut, set(chosen.tensors)) == ("state_dict", prefix, {"a.weight", "a.bias"})
    assert chosen.passed_over == ["epoch", "hyper_parameters"]
    largest = choose({"student": linear(1), "teacher": linear(2) | {"b": torch.zeros(9)}})  # names nobody knows
    assert (largest.name, largest.others) == ("teacher", {"student": 2})


def test_network_that_is_known_is_found_among_the_parts_of_a_module(tmp_path: Path) -> None:
    state = random_state(WIDTH8, dtype=torch.float32)
    both = under("model.", state) | under("ema_model.", state) | {"loss.weight": torch.ones(3)}
    chosen = choose({"state_dict": both, "epoch": 3})
    assert (chosen.name, chosen.cut) == ("state_dict.model", "model.")
    assert chosen.tensors.keys() == state.keys()
    assert chosen.others == {"state_dict": len(both), "state_dict.ema_model": len(state)}
    assert choose({"state_dict": both}, "state_dict").tensors.keys() == both.keys()


def test_tied_weights_count_once(tmp_path: Path) -> None:
    weight = torch.ones(500, 100)
    torch.save({"in.weight": weight, "out.weight": weight}, tmp_path / "tied.pt")
    found = dense(read(tmp_path / "tied.pt"), tmp_path / "tied.pt")
    assert all(torch.equal(value, weight) for value in found.values())
    assert found["in.weight"].data_ptr() != found["out.weight"].data_ptr()


def test_a_file_where_the_folder_should_be_is_told_in_a_line(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    (tmp_path / "out").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        import_weights(tmp_path / "w.pt", tmp_path / "out" / "w.safetensors")
