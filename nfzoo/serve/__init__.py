"""Answer requests over HTTP: `nfzoo serve`, by Starlette on uvicorn."""
