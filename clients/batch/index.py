"""Which lines of a batch are answered, and where each custom_id was first used; on disk, since a batch may be long."""

import sqlite3


class Index:
    """Used by one thread at a time. SQLite keeps a database without a name in a temporary file, and deletes it."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.executescript(
            "CREATE TABLE answered (custom_id TEXT PRIMARY KEY) WITHOUT ROWID;"
            "CREATE TABLE refused (line INTEGER PRIMARY KEY);"
            "CREATE TABLE used (custom_id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID;"
            # It never outlives the process, so nothing has to be safe from a crash.
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
        )

    def add_answered(self, custom_id: str) -> None:
        self._database.execute("INSERT OR IGNORE INTO answered VALUES (?)", (custom_id,))

    def add_refused(self, line: int) -> None:
        """A line of the input, from 1, that has its error because it is wrong itself."""
        self._database.execute("INSERT OR IGNORE INTO refused VALUES (?)", (line,))

    def is_answered(self, custom_id: str) -> bool:
        return self._has("SELECT 1 FROM answered WHERE custom_id = ?", custom_id)

    def is_refused(self, line: int) -> bool:
        return self._has("SELECT 1 FROM refused WHERE line = ?", line)

    def first_use(self, custom_id: str, line: int) -> int:
        """The first line that asked with this custom_id: this one, or an earlier one."""
        self._database.execute("INSERT OR IGNORE INTO used VALUES (?, ?)", (custom_id, line))
        (first,) = self._database.execute("SELECT line FROM used WHERE custom_id = ?", (custom_id,)).fetchone()
        return int(first)

    def close(self) -> None:
        self._database.close()

    def _has(self, query: str, key: str | int) -> bool:
        return self._database.execute(query, (key,)).fetchone() is not None
