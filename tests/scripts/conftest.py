"""What the tests of the scripts share."""

import functools

import datasets
import pytest
import run_clm
import run_glue
import run_image_classification
from datasets import Dataset, DatasetDict, Features
from running import CLM_FLAGS, GLUE_FLAGS, SCRIPT_FLAGS, ScriptResult, colour, tiny_bert_config
from support.embedded_data import python_documentation
from support.glue import load_embedded_data, make_model_and_tokenizer
from transformers import BertModel, set_seed


@pytest.fixture
def run_script(tmp_path, capsys):
    """Runs the main function of a script for two steps; flags given later win."""

    def run(script, *flags, output_dir="out"):
        folder = tmp_path / output_dir
        script.main(["--output_dir", str(folder), *SCRIPT_FLAGS, *map(str, flags)])
        return ScriptResult(folder, capsys.readouterr().out)

    return run


@pytest.fixture
def error(tmp_path, capsys):
    """Runs a script with wrong flags and returns its one line of complaint."""

    def run(script, *flags):
        with pytest.raises(SystemExit) as exit_:
            script.main(["--output_dir", str(tmp_path / "out"), *SCRIPT_FLAGS, *map(str, flags)])
        message = capsys.readouterr().err
        assert exit_.value.code == 2
        assert message.startswith(f"{script.__name__}.py: error: ")
        assert message.count("\n") == 1
        assert not (tmp_path / "out" / "trainer_state.json").exists()
        return message

    return run


@pytest.fixture
def glue(run_script):
    """Runs run_glue.py's main; flags given later win over the tiny settings."""
    return functools.partial(run_script, run_glue, *GLUE_FLAGS)


@pytest.fixture
def clm(run_script):
    """Runs run_clm.py's main, likewise."""
    return functools.partial(run_script, run_clm, *CLM_FLAGS)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A tiny BERT with its tokenizer, as `--model_name_or_path` takes it."""
    folder = tmp_path_factory.mktemp("bert")
    set_seed(0)
    _, tokenizer = make_model_and_tokenizer(load_embedded_data(), vocab_size=500)
    tokenizer.save_pretrained(folder)
    BertModel(tiny_bert_config(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    """Some English, and characters of two, three and four bytes."""
    path = tmp_path / "text.txt"
    path.write_text(python_documentation()[:9000] + "Größe, naïve, 数字, 😀!\n" * 40, "utf-8")
    return path


@pytest.fixture
def image_error(error):
    """Runs run_image_classification.py with wrong flags and returns its complaint."""

    def run(*flags):
        prefix = "run_image_classification.py: error: "
        return error(run_image_classification, *flags).removeprefix(prefix).removesuffix("\n")

    return run


@pytest.fixture
def image_dir(tmp_path):
    """Eight red and eight blue images to train on, four each held out; one large, one grey."""
    root = tmp_path / "colours"
    for split, count in (("train", 8), ("val", 4)):
        for name, red, blue in (("red", 200, 20), ("blue", 20, 200)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                size = (100, 80) if i == 3 else (16, 12)
                image = colour(red, blue, size, seed=i)
                image.save(root / split / name / (f"{i}.jpg" if i == 3 else f"{i}.PNG"))
    colour(200, 20).convert("L").save(root / "train" / "red" / "grey.png")
    (root / "train" / "red" / "notes.txt").write_text("not an image")
    return root


def hub_set(count, features, rows):
    """A data set with as many columns of images as `features` names, and others."""
    columns = {
        name: [colour(200 * (i % 2), 20, (32, 32), i) for i in range(count)]
        if isinstance(feature, datasets.Image)
        else [rows[name][i % len(rows[name])] for i in range(count)]
        for name, feature in features.items()
    }
    return Dataset.from_dict(columns, features=Features(features))


@pytest.fixture
def hub(monkeypatch):
    """Puts a data set on the hub."""

    def put(features, rows, held_out=None, splits=("train", "test")):
        data = DatasetDict(
            {
                split: hub_set(8, features, rows if split == "train" else held_out or rows)
                for split in splits
            }
        )
        monkeypatch.setattr(datasets, "load_dataset", lambda name, config_name: data)

    datasets.disable_progress_bars()
    yield put
    datasets.enable_progress_bars()
