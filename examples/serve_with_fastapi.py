"""The server of serve_chats.py over HTTP, with FastAPI: pip install fastapi uvicorn.

python examples/serve_with_fastapi.py MODEL.gguf FOLDER [PORT]
curl 127.0.0.1:8000/chats/mine --json '{"text": "Hello"}'
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from serve_chats import Chats, opened

import llama_state as ls


class Message(BaseModel):
    """What a user says."""

    text: str


class Answer(BaseModel):
    """What the model answers, and how many tokens of the chat had to be evaluated for it."""

    text: str
    evaluated: int


def make_app(path: str, folder: str) -> FastAPI:
    """Make the application; the model is loaded when it starts and closed when it ends."""
    tokens: dict[str, list[int]] = defaultdict(list)
    running: list[Chats] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with opened(path, folder) as chats:
            running.append(chats)
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/chats/{name}")
    async def say(name: str, message: Message) -> Answer:
        try:
            text, evaluated = await running[0].say(tokens[name], message.text)
        except ls.CapacityError as error:
            raise HTTPException(413, str(error)) from error
        return Answer(text=text, evaluated=evaluated)

    return app


if __name__ == "__main__":
    port = int(sys.argv[3]) if len(sys.argv) > 3 else 8000
    uvicorn.run(make_app(*sys.argv[1:3]), port=port)
