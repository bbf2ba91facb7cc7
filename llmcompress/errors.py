"""Errors a user can act on.

LLMCompressError
├── RecipeError         the YAML is wrong; nothing was loaded
├── SourceError         the model cannot be found, read or trusted
├── PlanError           the recipe does not fit this model or this machine; nothing was loaded
├── CalibrationError    the data did not do its job (no tokens, too short, not finite)
├── NumericalError      a method could not finish; the message names the tensor and a remedy
├── FormatError         a checkpoint is not what its config says
├── ResumeError         the folder holds something else, or a run that cannot be continued
├── EvaluationError     a score could not be taken, or two scores cannot be compared
└── PublishError        the Hub refused; the local checkpoint is intact

Every message says where, what was found, what was expected and what to try. Anything else that is raised is our bug
and shows a traceback. Callers add context (the tensor's name, the recipe's path) with `exc.add_note(...)`.
"""


class LLMCompressError(Exception):
    """Base of every error that the user can fix; the command line exits with 2."""


class RecipeError(LLMCompressError):
    """The recipe is wrong; nothing was loaded."""


class SourceError(LLMCompressError):
    """The model cannot be found, read or trusted."""


class PlanError(LLMCompressError):
    """The recipe does not fit this model or this machine; nothing was loaded."""


class CalibrationError(LLMCompressError):
    """The calibration data did not do its job."""


class NumericalError(LLMCompressError):
    """A method could not finish."""


class FormatError(LLMCompressError):
    """A checkpoint is not what its config says."""


class ResumeError(LLMCompressError):
    """The output folder holds something else, or a run that cannot be continued."""


class EvaluationError(LLMCompressError):
    """A score could not be taken, or two scores cannot be compared."""


class PublishError(LLMCompressError):
    """The Hub refused; the local checkpoint is intact."""
