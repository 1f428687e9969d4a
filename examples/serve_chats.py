"""A server of chats with asyncio: many clients share one context, each goes on where it was.

    python examples/serve_chats.py MODEL.gguf FOLDER [PORT]      # then: nc 127.0.0.1 8765

A line that a client sends is a message, a line that it gets is the answer.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import llama_state as ls
from llama_state.aio import AsyncContext, AsyncPrefixStore

N_ANSWER = 16


class Chats:
    """One context for all chats: the store brings each back when it is its turn."""

    def __init__(self, model: ls.Model, actx: AsyncContext, store: AsyncPrefixStore) -> None:
        self.model, self.actx, self.store = model, actx, store
        self.turn = asyncio.Lock()

    async def say(self, chat: list[int], text: str) -> tuple[str, int]:
        """Add a message and its answer to *chat*; return the answer, and how much was evaluated."""
        message = self.model.tokenize(f"User: {text}\nAssistant:", add_special=not chat)
        tokens = [*chat, *message]
        async with self.turn:  # a turn is several calls, which belong together
            recalled = await self.store.prefill(self.actx, tokens)
            found: list[int] = []
            for _ in range(N_ANSWER):  # a client that is gone ends this between two tokens
                logits = await self.actx.logits()
                found.append(max(range(len(logits)), key=logits.__getitem__))
                await self.actx.decode(found[-1:])
            await self.store.remember(self.actx, [*tokens, *found], wait=False)
        chat[:] = [*tokens, *found]
        return self.model.detokenize(found), len(tokens) - len(recalled.tokens)


@asynccontextmanager
async def opened(path: str, folder: str) -> AsyncIterator[Chats]:
    """Open the model, a context and the store, and close them in the end."""
    with ls.Model(path) as model:
        async with (
            AsyncContext(model.context(n_ctx=1024)) as actx,
            AsyncPrefixStore(ls.PrefixStore(folder, capacity_bytes=1 << 30)) as store,
        ):
            yield Chats(model, actx, store)


async def main(path: str, folder: str, port: str = "8765") -> None:
    """Run the example."""
    async with opened(path, folder) as chats:

        async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            chat: list[int] = []
            try:
                while line := await reader.readline():
                    answer, evaluated = await chats.say(chat, line.decode().rstrip("\n"))
                    print(f"evaluated {evaluated} of {len(chat) - N_ANSWER} tokens", flush=True)
                    writer.write(f"{answer!r}\n".encode())
                    await writer.drain()
            except ls.CapacityError as error:  # this chat is too long; the others go on
                writer.write(f"{error}\n".encode())
            except ConnectionError:
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(client, "127.0.0.1", int(port))
        print(f"listening on port {server.sockets[0].getsockname()[1]}", flush=True)
        async with server:
            await server.serve_forever()


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        print("closed")
