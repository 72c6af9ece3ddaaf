"""The ways in which a run ends early without a defect of ours; anything else that is raised is one."""


class UserError(Exception):
    """Something the user can mend. Printed as one line, `what (where): fix`; exit status 2."""

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        self.tell = True
        """Whether this rank is the one to say so, where all ranks raise the same."""
        super().__init__(f"{what}{f' ({where})' if where else ''}{f': {fix}' if fix else ''}")


class Interrupted(Exception):
    """Stopped on request after saving; exit status 75, start again with --resume."""


class RankLost(Exception):
    """Another rank is gone, exit ``status`` 69: start again with --resume; or it has ended by an error of its own, of
    which this is the status. ``tell``: this rank is the one to say so."""

    def __init__(self, what: str, status: int, tell: bool) -> None:
        self.status, self.tell = status, tell
        super().__init__(what)
