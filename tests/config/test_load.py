"""Reading, composing, refusing, explaining and writing run files."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddpm_lmk.config import Duration, RunConfig, Section
from ddpm_lmk.config.explain import kind_of
from ddpm_lmk.config.load import ABSENT, config_hash, diff_runs, dump_run, explain, load_run, load_yaml
from ddpm_lmk.errors import CheckpointError, ConfigError

RUN = """\
name: ceph
data:
  path: shards/ceph
  image_size: 64
task:
  kind: landmarks
  codec:
    kind: spatial
    sigma_px: 3
optim:
  lr: 1e-5
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def load_text(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    return load_run(path, list(overrides))


def test_numbers_with_an_exponent_are_numbers(run_file: Path) -> None:
    assert load_run(run_file).optim.lr == 1e-5


def test_overrides_win_over_the_file_and_the_file_over_defaults(run_file: Path) -> None:
    run = load_run(run_file, ["optim.lr=2e-4", "train.duration=3 epochs", "data.path=[a, b]", "optim.clip.limit=2"])
    assert (run.optim.lr, run.optim.weight_decay, run.data.image_size) == (2e-4, 0.01, 64)
    assert run.train.duration == Duration(3, "epochs")
    assert run.data.path == ("a", "b")
    assert run.optim.clip is not None
    assert run.optim.clip.limit == 2


def test_extends_is_relative_to_its_file_and_later_files_win(run_file: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "size.yaml").write_text("data: {image_size: 128}\nseed: 4\n")
    (inner / "top.yaml").write_text("extends: [../run.yaml, size.yaml]\nseed: 9\n")
    run = load_run(inner / "top.yaml")
    assert (run.name, run.data.image_size, run.seed) == ("ceph", 128, 9)


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load_run(tmp_path / "a.yaml")


def test_missing_parent_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 2: extends 'nowhere\.yaml'"):
        load_text(tmp_path, "seed: 1\nextends: nowhere.yaml\n")


def test_changing_the_kind_drops_what_the_old_kind_had_set(run_file: Path) -> None:
    run = load_run(run_file, ["task.codec.kind=disc"])
    assert run.task.kind == "landmarks"
    assert run.task.codec.kind == "disc"
    assert run.task.codec.sigma_px == 5.0
    assert load_run(run_file, ["task.kind=denoise", "task.t_min=7"]).task.model_dump()["t_min"] == 7


def test_kind_of_an_optimizer_is_a_plain_setting_that_drops_nothing(run_file: Path) -> None:
    assert load_run(run_file, ["optim.kind=sgd"]).optim.lr == 1e-5


def test_written_file_loads_to_the_same_run(run_file: Path, tmp_path: Path) -> None:
    run = load_run(run_file, ["name=1e-5", "optim.clip={kind: value}", "train.ema=null", "optim.warmup=1.5 epochs"])
    again = load_text(tmp_path, dump_run(run))
    assert again == run
    assert config_hash(again) == config_hash(run)


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(min_value=1e-12, max_value=1e3),
    name=st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True),
    path=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
)
@example(lr=1.0, name="Y", path="no")
def test_any_value_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, lr: float, name: str, path: str
) -> None:
    run = RunConfig.model_validate(
        {"name": name, "data": {"path": [path]}, "task": {"kind": "denoise"}, "optim": {"lr": lr}}
    )
    file = tmp_path_factory.mktemp("round") / "run.yaml"
    file.write_text(dump_run(run), encoding="utf-8")
    assert load_run(file) == run


def test_a_path_that_is_no_utf8_comes_back_from_the_file_of_its_run(run_file: Path, tmp_path: Path) -> None:
    run = load_run(run_file)
    data = run.data.model_copy(update={"path": ("p\udcffü # x",)})
    run = run.model_copy(update={"data": data})
    (tmp_path / "config.yaml").write_text(dump_run(run), "utf-8")
    assert load_run(tmp_path / "config.yaml") == run


def test_a_sweep_file_given_to_a_run_is_sent_to_its_command(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("name: table\nrun: run.yaml\ngrids: []\n")
    with pytest.raises(ConfigError, match=r"is a sweep file; use `ddpm-lmk sweep .*sweep\.yaml`"):
        load_run(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("word", "named", "nearest"),
    [
        ("optim.lrr=1", "unknown key optim.lrr", "did you mean optim.lr?"),
        ("lr=1", "unknown key lr", "did you mean optim.lr?"),
        ("data.augment.rotate_degrees=1", "data.augment.rotate_degrees", "did you mean data.augment.rotate_deg?"),
        ("dat.path=x", "unknown key dat", "did you mean data?"),
        ("task.codec.sigma=1", "unknown key task.codec.sigma", "did you mean task.codec.sigma_px?"),
        ("model.multiplier=[1]", "unknown key model.multiplier", "did you mean model.multipliers?"),
        ("train.lenght=1", "unknown key train.lenght", "did you mean train.duration?"),  # a misspelt old name
        ("data.residencey=ram", "unknown key data.residencey", "did you mean runtime.cache_pixels?"),
        ("optim.learning_rate=1", "unknown key optim.learning_rate", "did you mean optim.lr?"),  # as others call it
        ("train.epochs=1", "unknown key train.epochs", "did you mean train.duration?"),
    ],
)
def test_unknown_key_is_named_with_its_path_and_nearest_name(
    run_file: Path, word: str, named: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(run_file, [word])
    assert named in str(error.value)
    assert nearest in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("image_size: 64", "image_size: big", 4, "data.image_size='big'"),
        ("image_size: 64", "image_size: 64.5", 4, "data.image_size=64.5"),
        ("image_size: 64", "image_size: [64]", 4, "data.image_size=[64]"),
        ("name: ceph", "seed: true", 1, "seed=true: wanted a number"),
        ("name: ceph", "model: {multipliers: [1, true]}", 1, "model.multipliers.1=true: wanted a number"),
        ("sigma_px: 3", "sigma_px: -3", 9, "task.codec.sigma_px=-3"),
        ("kind: spatial", "kind: spacial", 7, "task.codec.kind='spacial'; wanted 'disc', 'spatial'"),
        ("lr: 1e-5", "lr: fast", 11, "optim.lr='fast'"),
        ("lr: 1e-5", "lr: .nan", 11, "optim.lr=nan"),
        ("lr: 1e-5", "lr: .inf", 11, "optim.lr=inf"),
        ("lr: 1e-5", "eps: nan", 11, "optim.eps='nan'"),
        ("lr: 1e-5", "decay_all: no", 11, "optim.decay_all: no is ambiguous"),
        ("name: ceph", "name: no", 1, "name: no is ambiguous"),
        ("name: ceph", "name: true", 1, """if text is meant, quote it: name="'true'\""""),
        ("name: ceph", "name: a\ntrain: {duration: 5 years}", 2, "train.duration='5 years'"),
        ("name: ceph", "name: a\nname: b", 2, "duplicate key 'name'"),
        ("image_size: 64", "image_size: 64\n  path: b", 5, "duplicate key 'data.path', first at"),
        ("image_size: 64", "image_size: {", 6, "not valid YAML"),
    ],
)
def test_wrong_value_is_named_with_key_value_and_line(
    tmp_path: Path, old: str, new: str, line: int, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_text(tmp_path, RUN.replace(old, new))
    assert message in str(error.value)
    assert f"other.yaml, line {line}" in str(error.value)
    assert "\n" not in str(error.value)


def test_not_finite_bounded_number_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.augment\.rotate_deg"):
        load_text(tmp_path, RUN, "data.augment.rotate_deg=.nan")


def test_wrong_override_is_blamed_on_the_command_line(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"command line: optim\.lr='fast'"):
        load_run(run_file, ["optim.lr=fast"])
    with pytest.raises(ConfigError, match="wanted key=value"):
        load_run(run_file, ["optim.lr"])


@pytest.mark.parametrize(
    ("word", "path"),
    [
        ("2024", ("2024",)),
        ("2024.10", ("2024.10",)),
        ("1.50", ("1.50",)),
        ("007", ("007",)),
        ("1e3", ("1e3",)),
        ("-0", ("-0",)),
        ("[2023, 2024.10, films]", ("2023", "2024.10", "films")),
        ("films #2", ("films #2",)),
        ("films: 2", ("films: 2",)),
        ("@home", ("@home",)),
        ("a, b", ("a, b",)),
        ("'no'", ("no",)),
    ],
)
def test_word_is_the_text_that_was_typed_where_the_field_is_text(
    run_file: Path, word: str, path: tuple[str, ...]
) -> None:
    assert load_run(run_file, [f"data.path={word}"]).data.path == path


def test_home_is_known_behind_an_equals_sign(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of me")
    assert load_run(run_file, ["data.path=~/films"]).data.path == ("/home/of me/films",)
    assert load_run(run_file, ["data.path=films~/x"]).data.path == ("films~/x",)


def test_numbers_name_splits_runs_and_folders_in_files_too(tmp_path: Path) -> None:
    text = "name: 12\ndata: {path: [2024.10, 7], splits: [0, 1]}\ntask: {kind: landmarks}\nevaluate: {split: 2}\n"
    run = load_text(tmp_path, text)
    assert (run.name, run.data.path, run.data.splits) == ("12", ("2024.10", "7"), ("0", "1"))
    assert run.evaluate.split == "2"
    assert load_text(tmp_path, dump_run(run)) == run


def test_number_that_stays_text_is_a_number_where_one_is_wanted(run_file: Path) -> None:
    words = ["optim.lr=0.10", "train.duration=1.50e2 steps", "optim.betas=[0.90, 0.990]", "optim.warmup=5.0"]
    run = load_run(run_file, words)
    assert (run.optim.lr, run.train.duration, run.optim.betas) == (0.1, Duration(150), (0.9, 0.99))
    assert run.optim.warmup == Duration(5)


def test_word_that_is_no_text_says_how_to_quote_it(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"""data\.path=True: .*quote it: data\.path="'true'\""""):
        load_run(run_file, ["data.path=true"])
    with pytest.raises(ConfigError, match=r"""no is ambiguous.*"'no'" on the command line"""):
        load_run(run_file, ["data.splits=no"])
    with pytest.raises(ConfigError, match=r"""begins with \[ has to be quoted: "'\[2024\] films'\""""):
        load_run(run_file, ["data.path=[2024] films"])


def test_missing_key_tells_how_to_give_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is missing.*data\.path=DIR"):
        load_text(tmp_path, "data: {}\ntask: {kind: denoise}\n")
    with pytest.raises(ConfigError, match="data is missing"):
        load_text(tmp_path, "task: {kind: denoise}\n")
    with pytest.raises(ConfigError, match="task is missing"):
        load_text(tmp_path, "data: {path: x}\n")


def test_sections_that_disagree_are_refused_in_their_own_words(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.select=best needs data\.validation_split"):
        load_run(run_file, ["train.select=best"])


def test_split_that_pre_training_would_ignore_is_refused(run_file: Path) -> None:
    words = ["task.kind=denoise", "data.shots=null"]
    assert load_run(run_file, words).evaluate.split == "test"
    with pytest.raises(ConfigError, match=r"evaluate\.split=val is for task landmarks"):
        load_run(run_file, [*words, "evaluate.split=val"])


def test_several_mistakes_are_counted(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(and 1 more\)"):
        load_run(run_file, ["optim.lr=fast", "seed=-1"])


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: !!python/object/apply:os.system ['touch PWNED']\n", "tag"),
        ("name: !mine x\n", "tag"),
        (BOMB, "alias"),
        ("a: &a {b: *a}\n", "alias"),
        ("name: " + "x" * 2**20, "1 MiB"),
        ("name: " + "[" * 100_000, "deeper than"),
        ("name: [" + "0," * 300_000 + "]", "items"),
    ],
    ids=["python tag", "own tag", "alias bomb", "alias to itself", "large", "deep", "many"],
)
def test_dangerous_yaml_is_refused_unread_and_unexpanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="refused for safety") as error:
        load_text(tmp_path, text)
    assert message in str(error.value)
    assert error.value.exit_code == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"- a\n- b\n", b"just words\n"])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_run(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_run(path)


def test_diff_lists_changed_keys_and_keys_only_one_side_has(run_file: Path) -> None:
    a = load_run(run_file)
    b = load_run(run_file, ["optim.lr=1", "task.codec.kind=disc", "optim.clip={limit: 2}"])
    rows = {key: (left, right) for key, left, right in diff_runs(a, b)}
    assert rows["optim.lr"] == (1e-5, 1.0)
    assert rows["task.codec.decode_radius_px"] == (6.0, ABSENT)
    assert rows["optim.clip"] == (None, ABSENT)
    assert rows["optim.clip.limit"] == (ABSENT, 2.0)
    assert "seed" not in rows
    assert diff_runs(a, a) == []


def test_hash_changes_with_any_value_and_only_then(run_file: Path) -> None:
    assert config_hash(load_run(run_file)) == config_hash(load_run(run_file, ["optim.lr=0.00001"]))
    assert config_hash(load_run(run_file)) != config_hash(load_run(run_file, ["seed=1"]))


def test_explain_lists_every_key_of_a_written_run_with_a_description(run_file: Path) -> None:
    rows = explain(RunConfig)
    keys = {row[0] for row in rows}

    def dotted(data: dict, prefix: str = "") -> set[str]:
        nested = [dotted(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}"} for k, v in data.items()]
        return set().union(*nested)

    assert dotted(yaml.safe_load(dump_run(load_run(run_file)))) <= keys
    assert ("optim.betas", "list of float", "[0.9, 0.999]", ">= 0, < 1", "AdamW betas") in rows
    undescribed = [row[0] for row in rows if not row[4].strip() and not row[0].endswith("kind")]
    assert undescribed == []


def test_plain_yaml_loads_with_its_extends(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("set: {optim.lr: 1e-4}\ngrids: [{shots: [1]}]\n")
    (tmp_path / "sweep.yaml").write_text("extends: base.yaml\ngrids:\n  - {shots: [1, 5], start: {scratch: null}}\n")
    data = load_yaml(tmp_path / "sweep.yaml")
    assert data == {"set": {"optim.lr": "1e-4"}, "grids": [{"shots": [1, 5], "start": {"scratch": None}}]}


def test_a_section_without_a_default_kind_is_known_by_the_kind_that_chooses_it() -> None:
    class Plain(Section):
        kind: Literal["plain"]

    assert kind_of(Plain) == "plain"


@pytest.mark.parametrize(
    ("task", "told"),
    [({"kind": "denoise"}, True), ({"kind": "landmarks"}, False), ({"kind": "landmarks", "timestep": 3}, True)],
)
def test_a_task_says_whether_it_tells_a_timestep(task: dict[str, object], told: bool) -> None:
    run = RunConfig.model_validate({"data": {"path": "x"}, "task": task})
    assert run.is_time_conditioned == told


def test_a_key_of_another_kind_is_not_suggested_for_itself(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("task: {kind: landmarks}\ndata: {path: x}\nmodel: {frozen: true}\n")
    with pytest.raises(ConfigError, match=r"unknown key model\.frozen here: it belongs to another model\.kind"):
        load_run(tmp_path / "run.yaml", [])
