"""Reports are added up, and a score knows its nats."""

import math

import pytest

from dflows.reporting import Report, Row, Score


def test_reports_are_added_and_metrics_by_split_merged():
    report = Report({"characters": {"valid": 3}, "passes": 1}).row("a", "1")
    report += Report({"characters": {"test": 4}, "passes": 2}, [Row("b", "2", "remark")])
    assert report.metrics == {"characters": {"valid": 3, "test": 4}, "passes": 2}
    assert report.rows == [("a", "1", ""), ("b", "2", "remark")]


def test_what_is_added_is_left_as_it_is():
    first, second = Report({"characters": {"valid": 3}}), Report({"characters": {"test": 4}})
    total = Report()
    total += first
    total += second
    assert first.metrics == {"characters": {"valid": 3}}
    assert total.metrics == {"characters": {"valid": 3, "test": 4}}


def test_nats_are_those_of_an_example():
    score = Score("test", bpc=2.0, characters=40, examples=10)
    assert score.nats == pytest.approx(8 * math.log(2))
