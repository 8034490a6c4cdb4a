"""Corpora, tokenizers, mixtures and question sets: everything that touches text before the model does."""


class UserError(Exception):
    """A mistake that the user can mend. Its message is one sentence that says how."""
