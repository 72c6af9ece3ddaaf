"""The two ways in which a run ends early on purpose; anything else that is raised is a defect of ours."""


class UserError(Exception):
    """Something the user can mend. Printed as one line, `what (where): fix`; exit status 2."""

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(f"{what}{f' ({where})' if where else ''}{f': {fix}' if fix else ''}")


class Interrupted(Exception):
    """Stopped on request after saving; exit status 75, start again with --resume."""
