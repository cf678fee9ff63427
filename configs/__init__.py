"""The shipped experiments: what ``--config NAME.yaml`` finds by its bare name."""
