"""The courier on the server: transports the messages in the mail folder as long as the Flower run is alive.

It is stateless, so it can be killed and restarted at any time.
"""

import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from .mail import Mail
from .spool import put

TIMEOUT_SECONDS = 120.0
"""Time after which a message without an answer is given up."""

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Transports messages until another Flower run takes over or MAIL/done exists."""
    mail, generation = Path(str(context.run_config["mail"])), str(context.run_config["generation"])
    courier = Mail(mail)
    asked: dict[str, tuple[int, float]] = {}
    while (mail / "generation").read_text() == generation and not (mail / "done").exists():
        put(mail / "alive", str(time.time()).encode())
        busy = {node for node, _ in asked.values()}
        for node in grid.get_node_ids():
            put(mail / "nodes" / str(node), b"")
            if node not in busy and (record := courier.load(str(node))):
                content = RecordDict({"mail": ConfigRecord(record)})
                message = Message(content=content, dst_node_id=node, message_type="query", ttl=TIMEOUT_SECONDS)
                for identity in grid.push_messages([message]):
                    if identity:  # empty if the node has just disconnected
                        asked[identity] = (node, time.monotonic())
        for identity, (node, _) in list(asked.items()):
            try:
                for reply in grid.pull_messages([identity]):
                    del asked[identity]
                    if reply.has_content() and "mail" in reply.content:
                        courier.unload(str(node), dict(reply.content["mail"]))
            except Exception as error:  # an invalid answer of one node must not affect the others
                print(f"node {node}: cannot read its answer: {type(error).__name__}")
                asked.pop(identity, None)
        asked = {
            identity: (node, at) for identity, (node, at) in asked.items() if time.monotonic() - at < TIMEOUT_SECONDS
        }
        time.sleep(0.3)
