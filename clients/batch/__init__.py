"""`fastblt batch`: a file of requests in OpenAI's batch format, sent to a running server.

`requests` reads the file, `index` knows which of its lines have been answered, `results` writes the answers, `run`
sends. Neither file is ever in memory: the index is a temporary database on disk.
"""
