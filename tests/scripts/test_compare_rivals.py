"""The comparison's rivals, in the hands of `Trainer`."""

import dataclasses

import compare
import pytest
from comparison.candidates import CANDIDATES
from comparison_helpers import carry_out, prose_run


@pytest.mark.slow
def test_the_authors_package_searches_and_logs_its_step_size(tmp_path):
    results = carry_out(prose_run(tmp_path, "authors"))
    assert results["losses"][-1] < 0.8 * results["losses"][0]
    assert results["extra_forward_passes"] >= results["updates"]
    assert len(set(results["step_sizes"])) > 3
    assert all(0 < size < 1.1 for size in results["step_sizes"])


def test_prodigys_rate_is_the_one_it_found(tmp_path):
    sizes = carry_out(prose_run(tmp_path, "prodigy"))["step_sizes"]
    assert sizes[0] == pytest.approx(1e-6)
    assert sizes[-1] > 10 * sizes[0]


def test_a_missing_rival_is_named(tmp_path, monkeypatch, capsys):
    missing = dataclasses.replace(CANDIDATES["prodigy"], package="no-such-package")
    monkeypatch.setitem(CANDIDATES, "prodigy", missing)
    with pytest.raises(SystemExit):
        compare.main(["--preset", "smoke", "--output_dir", str(tmp_path)])
    said = "prodigy needs no-such-package: pip install -c constraints.txt -e '.[compare]'"
    assert said in capsys.readouterr().err
