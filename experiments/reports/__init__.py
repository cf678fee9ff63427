"""Tables and figures, each made from records alone."""
