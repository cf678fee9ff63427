"""What processes do together; tests/experiments/test_drills.py lets them fail in all ways."""

from dflows.cli.trainer import Trainer


def test_the_time_that_processes_wait_is_a_key():
    trainer = Trainer(devices=2, strategy="ddp", accelerator="cpu", collective_timeout=90)
    assert trainer.strategy._timeout.total_seconds() == 90
