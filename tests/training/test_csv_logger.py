"""metrics.csv at every moment of a run's life."""

from __future__ import annotations

from pathlib import Path

from subspace_lab.training.csv_logger import RunCSVLogger


def test_rows_columns_and_digits(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    logger = RunCSVLogger(file)
    logger.log_metrics({"loss": 0.1 + 0.2}, step=1)
    logger.log_metrics({"val": 2.0}, step=1)  # the same row
    logger.log_metrics({"loss": 1e-17}, step=2)
    logger.log_metrics({"loss": 3.0, "new": 4.0}, step=3)
    assert file.read_text() == "step,loss,val\n1,0.30000000000000004,2.0\n2,1e-17,\n"
    logger.save()
    assert file.read_text() == "step,loss,val,new\n1,0.30000000000000004,2.0,\n2,1e-17,,\n3,3.0,,4.0\n"
    logger.log_metrics({"val": 5.0}, step=3)  # after the row was written
    logger.finalize("success")
    assert file.read_text().splitlines()[-1] == "3,3.0,5.0,4.0"


def test_resume_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss\n1,1.0\n2,2.0\n3,3.0\n4,4.")
    logger = RunCSVLogger(file)
    logger.drop_rows_after(2)
    assert file.read_text() == "step,loss\n1,1.0\n2,2.0\n"
    logger.log_metrics({"loss": 30.0}, step=3)
    logger.save()
    assert file.read_text() == "step,loss\n1,1.0\n2,2.0\n3,30.0\n"


def test_torn_line_without_a_checkpoint_does_not_join_the_next_row(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss\n1,1.0\n2,2")
    logger = RunCSVLogger(file)
    logger.drop_rows_after(0)
    logger.log_metrics({"loss": 1.5}, step=1)
    logger.save()
    assert file.read_text() == "step,loss\n1,1.5\n"
