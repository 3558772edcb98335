"""The official metric of each GLUE task as an `evaluate.Metric` that needs no download.

`evaluate.load("glue", task)` fetches its code from the hub; this one computes the same figures
under the same names with scikit-learn and SciPy.
"""

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

# The GLUE tasks, and the two kinds of data of one's own.
METRIC_NAMES = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
    "classification": ("accuracy",),
    "regression": ("pearson", "spearmanr"),
}


def _pearson(references: np.ndarray, predictions: np.ndarray) -> float:
    return pearsonr(predictions, references).statistic


def _spearman(references: np.ndarray, predictions: np.ndarray) -> float:
    return spearmanr(predictions, references).statistic


_FUNCTIONS = {
    "accuracy": accuracy_score,
    "f1": f1_score,  # of class 1
    "matthews_correlation": matthews_corrcoef,
    "pearson": _pearson,
    "spearmanr": _spearman,
}


class GlueMetric(evaluate.Metric):
    """The metric of one GLUE task: `GlueMetric("mrpc").compute(predictions=..., references=...)`.

    Args:
        config_name: A GLUE task, or "classification" or "regression" for data of one's own.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRIC_NAMES:
            raise ValueError(
                f"config_name={self.config_name!r} is not one of {', '.join(METRIC_NAMES)}"
            )
        continuous = "pearson" in METRIC_NAMES[self.config_name]
        value = datasets.Value("float64" if continuous else "int64")
        return evaluate.MetricInfo(
            description="The official metrics of the GLUE benchmark (Wang et al., ICLR 2019).",
            citation="https://openreview.net/forum?id=rJ4km2R5t7",
            inputs_description="predictions, references: the predicted and the true class, or "
            "value, of each example.",
            features=datasets.Features({"predictions": value, "references": value}),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        names = METRIC_NAMES[self.config_name]
        if "pearson" in names and np.ptp(predictions) == 0:
            # A model that predicts one value for everything has no correlation: 0, as Matthews'
            # has it, instead of SciPy's NaN, with which no two runs compare.
            return dict.fromkeys(names, 0.0)
        return {name: float(_FUNCTIONS[name](references, predictions)) for name in names}
