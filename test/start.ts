/** Starts the real server inside the test's process, on loopback, as `main` of server.ts does. */
import { once } from "node:events";
import { createServer as createNetServer } from "node:net";
import type { AddressInfo } from "node:net";
import { createServer, readSettings } from "../server.ts";
import { openTaskStore } from "../tools.ts";
import type { TaskStore } from "../tools.ts";

/** A port that is free now. MCP_SERVER_URL holds the port, so it has to be known before the server exists. */
export async function freePort(): Promise<number> {
  const server = createNetServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, "close");
  return port;
}

export interface RunningServer {
  /** MCP_SERVER_URL */
  url: string;
  store: TaskStore;
  close(): Promise<void>;
}

/**
 * @param env Overrides what a test needs: AUTH0_DOMAIN at least. Tasks are kept in memory unless it says otherwise.
 * @param store Where a test brings its own; it is closed with the server all the same.
 */
export async function startServer(env: Record<string, string>, store?: TaskStore): Promise<RunningServer> {
  const port = await freePort();
  const url = env.MCP_SERVER_URL ?? `http://localhost:${port}/mcp`;
  const settings = readSettings({
    DATABASE_URL: "memory:",
    LOG_LEVEL: "silent",
    ...env,
    MCP_SERVER_URL: url,
    PORT: new URL(url).port || String(port),
  });
  const tasks = store ?? await openTaskStore(settings.databaseUrl, () => {});
  const server = createServer(settings, tasks).listen(settings.port, settings.host);
  await once(server, "listening");
  return {
    url,
    store: tasks,
    async close() {
      server.close();
      server.closeAllConnections();
      await tasks.close();
    },
  };
}
