"""What the tests of operation share. `make test-ops` installs what they need; `make test` leaves them out."""
