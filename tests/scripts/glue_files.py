"""Files as GLUE spells them, and what they say."""

from typing import NamedTuple


class TaskFiles(NamedTuple):
    """A GLUE task's files: their header and two lines, and what these say."""

    folder: str
    header: str | None
    lines: list[str]
    examples: list[dict]
    label_names: list[str] | None


PAIR = {"sentence1": '"A cat sat.', "sentence2": "It sat."}
PAIR_LINE = '"A cat sat.\tIt sat.'  # GLUE's files know no quoting
# fmt: off
TASK_FILES = {
    "cola": TaskFiles(
        "CoLA", None, ["gj04\t1\t\tHe said so.", "gj04\t0\t*\tHe so said."],
        [{"sentence1": "He said so.", "label": 1}, {"sentence1": "He so said.", "label": 0}],
        ["unacceptable", "acceptable"],
    ),
    "sst2": TaskFiles(
        "SST-2", "sentence\tlabel", ["a \"joy \t1", "dull \t0"],
        [{"sentence1": "a \"joy ", "label": 1}, {"sentence1": "dull ", "label": 0}],
        ["negative", "positive"],
    ),
    "mrpc": TaskFiles(
        "MRPC", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        [f"1\t10\t11\t{PAIR_LINE}", f"0\t12\t13\t{PAIR_LINE}"],
        [{**PAIR, "label": 1}, {**PAIR, "label": 0}], ["not_equivalent", "equivalent"],
    ),
    "stsb": TaskFiles(
        "STS-B", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
        "\tscore",
        [f"0\tg\tf\t2012\t0\tnone\tnone\t{PAIR_LINE}\t4.750",
         f"1\tg\tf\t2012\t1\tnone\tnone\t{PAIR_LINE}\t0.000"],
        [{**PAIR, "label": 4.75}, {**PAIR, "label": 0.0}], None,
    ),
    "qqp": TaskFiles(
        "QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        [f"0\t1\t2\t{PAIR_LINE}\t0", f"1\t3\t4\t{PAIR_LINE}\t1"],
        [{**PAIR, "label": 0}, {**PAIR, "label": 1}], ["not_duplicate", "duplicate"],
    ),
    "mnli": TaskFiles(
        "MNLI", "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
        "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        [f"0\t1\t1n\tg\t(\t(\t(\t(\t{PAIR_LINE}\tneutral\tcontradiction",
         f"1\t2\t2e\tg\t(\t(\t(\t(\t{PAIR_LINE}\tneutral\tentailment"],
        [{**PAIR, "label": 2}, {**PAIR, "label": 0}],
        ["entailment", "neutral", "contradiction"],
    ),
    "qnli": TaskFiles(
        "QNLI", "index\tquestion\tsentence\tlabel",
        [f"0\t{PAIR_LINE}\tentailment", f"1\t{PAIR_LINE}\tnot_entailment"],
        [{**PAIR, "label": 0}, {**PAIR, "label": 1}], ["entailment", "not_entailment"],
    ),
    "rte": TaskFiles(
        "RTE", "index\tsentence1\tsentence2\tlabel",
        [f"0\t{PAIR_LINE}\tnot_entailment", f"1\t{PAIR_LINE}\tentailment"],
        [{**PAIR, "label": 1}, {**PAIR, "label": 0}], ["entailment", "not_entailment"],
    ),
    "wnli": TaskFiles(
        "WNLI", "index\tsentence1\tsentence2\tlabel",
        [f"0\t{PAIR_LINE}\t1", f"1\t{PAIR_LINE}\t0"],
        [{**PAIR, "label": 1}, {**PAIR, "label": 0}], ["not_entailment", "entailment"],
    ),
}
# fmt: on
MNLI_DEV_HEADER = TASK_FILES["mnli"].header.replace(
    "label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5"
)


def write_glue(glue_dir, task):
    """Write the files of a task as GLUE spells them: 8 examples to train on, 4 in each other."""
    files = TASK_FILES[task]
    folder = glue_dir / files.folder
    folder.mkdir(parents=True)
    header = [] if files.header is None else [files.header]
    (folder / "train.tsv").write_text("\n".join([*header, *files.lines * 4, ""]))
    if task == "mnli":  # with the labels of five annotators before the one of gold
        lines = [line.replace("\tneutral\t", "\t-" * 5 + "\t") for line in files.lines * 2]
        for name in ("dev_matched.tsv", "dev_mismatched.tsv"):
            (folder / name).write_text("\n".join([MNLI_DEV_HEADER, *lines, ""]))
    else:
        (folder / "dev.tsv").write_text("\n".join([*header, *files.lines * 2, ""]))
