"""Spec files: what runs, in which boxes, with what data.

`load_spec` and `parse_spec` are strict: an unknown key, a wrong type or a dangling name
is an error with file, line and column, and all of them are reported at once.
"""

from voidbox.spec.load import client_env, copied_variables, input_files, load_spec, parse_spec, resolve_env
from voidbox.spec.models import Kind, Provider, Spec
from voidbox.spec.problems import Problem, SpecError

__all__ = [
    "Kind",
    "Problem",
    "Provider",
    "Spec",
    "SpecError",
    "client_env",
    "copied_variables",
    "input_files",
    "load_spec",
    "parse_spec",
    "resolve_env",
]
