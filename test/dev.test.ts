/** `npm run dev`: what it prints is all that a client needs, and its sign-in page all that a person needs. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer as createHttpServer } from "node:http";
import { createServer } from "node:net";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { Readable, Writable } from "node:stream";
import { test } from "node:test";
import type { TestContext } from "node:test";
import { dev } from "./run/dev.ts";
import { connect, Provider } from "./support/sdk-client.ts";
import { freePort, post, runCommandLine } from "./support/server.ts";
import { ALICE, BOB, configuredTenant, OIDC_SCOPES, startTenant } from "./support/tenant.ts";

const environment = async () => ({
  PORT: String(await freePort()),
  TENANT_PORT: String(await freePort()),
  LOG_LEVEL: "silent",
});

/** The value of `name` among the lines for `.env`. */
function printed(name: string, output: string): string {
  return new RegExp(`^ +${name}=(.+)$`, "m").exec(output)?.[1] ?? assert.fail(`${name} is not in ${output}`);
}

for (const kind of ["permissive", "strict"]) {
  test(`the SDK's client signs in with what is printed for a ${kind} tenant`, async (t) => {
    const lines: string[] = [];
    t.after(await dev(["--tenant", kind], await environment(), (line) => lines.push(line)));
    const output = lines.join("\n");
    const [, url = ""] = /The server is (\S+): give this URL/.exec(output) ?? [];
    const [, email = ""] = /sign in as\n +(\S+@\S+)$/m.exec(output) ?? [];
    const provider = new Provider();
    const client = await connect(url, provider, { email });
    t.after(() => client.close());
    assert.ok((await client.listTools()).tools.length > 0);
    assert.match(output, new RegExp(`stand-in, ${kind}`));

    const domain = printed("AUTH0_DOMAIN", output);
    const metadata = await (await fetch(`${domain}/.well-known/oauth-authorization-server`)).json();
    assert.equal(metadata.authorization_response_iss_parameter_supported, true);
    const grant = {
      grant_type: "client_credentials",
      client_id: printed("AUTH0_CLIENT_ID", output),
      client_secret: printed("AUTH0_CLIENT_SECRET", output),
      audience: printed("MCP_SERVER_URL", output),
    };
    const reply = await fetch(`${domain}/oauth/token`, { method: "POST", body: new URLSearchParams(grant) });
    const { access_token } = await reply.json();
    assert.equal((await post(url, access_token, "ping")).status, 200);
  });
}

test("the command line stays up, and a signal ends it with status 0", async () => {
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    const { child, outcome } = runCommandLine("dev", [], { env: await environment() });
    const [line] = await once(child.stdout, "data");
    assert.match(String(line), /^The server is http:\/\/localhost:\d+\/mcp: /);
    assert.ok(child.pid);
    process.kill(child.pid, signal); // not child.kill: Deno would then report the signal in place of the status
    assert.equal((await outcome).status, 0);
  }
});

test("the command line says in one line what stops it, and ends with status 1", async (t) => {
  const taken = createServer().listen(0, "127.0.0.1");
  t.after(() => taken.close());
  await once(taken, "listening");
  const { port } = taken.address() as { port: number };
  const free = String(await freePort());
  const line = `Port ${port} is in use: set PORT (the server's) or TENANT_PORT (the tenant's) to another\n`;
  for (const env of [{ PORT: String(port), TENANT_PORT: free }, { PORT: free, TENANT_PORT: String(port) }]) {
    const { status, stderr } = await runCommandLine("dev", [], { env }).outcome;
    assert.deepEqual([status, stderr], [1, line]);
  }
});

test("an unknown argument or tenant is refused, and --help says every option", async () => {
  await assert.rejects(dev(["--brake"], {}, assert.fail), /Unknown option '--brake'/);
  await assert.rejects(dev(["--tenant", "lenient"], {}, assert.fail), /--tenant must be permissive or strict/);
  const lines: string[] = [];
  await (await dev(["--help"], {}, (line) => lines.push(line)))();
  for (const name of ["--tenant", "--help", "PORT", "TENANT_PORT", "LOG_LEVEL"]) {
    assert.match(lines.join("\n"), new RegExp(`^  ${name} `, "m"));
  }
});

const CHROMIUM = (process.env.PATH ?? "").split(delimiter).map((directory) => join(directory, "chromium"))
  .find((path) => existsSync(path)) ?? "";
const skip = !CHROMIUM && process.env.REQUIRE_CHROMIUM !== "1" && "there is no chromium in PATH";

test(
  "a person signs in on a phone's width, by keyboard and without script",
  { skip, timeout: 60_000 },
  async (t) => {
    const callback = createHttpServer((_, response) => response.end("Signed in")).listen(0, "127.0.0.1");
    t.after(() => callback.close());
    t.after(() => callback.closeAllConnections());
    await once(callback, "listening");
    const redirect_uri = `http://localhost:${(callback.address() as AddressInfo).port}/callback`;
    const settings = configuredTenant("permissive", "http://localhost:1/mcp", "fixed");
    for (const application of settings.applications) application.callbackUrls = [redirect_uri];
    const tenant = await startTenant(settings);
    t.after(() => tenant.close());
    const page = new URL(`${tenant.origin}/authorize`);
    page.search = new URLSearchParams({
      response_type: "code",
      client_id: "fixed",
      redirect_uri,
      scope: `${OIDC_SCOPES.join(" ")} ${"a_scope_without_an_end_".repeat(5)}`,
    }).toString();

    const { send, look } = await openBrowser(t);
    const type = async (text: string) => {
      await send("Input.insertText", { text });
      const enter = { key: "Enter", text: "\r", windowsVirtualKeyCode: 13 };
      await send("Input.dispatchKeyEvent", { type: "keyDown", ...enter });
    };
    await send("Emulation.setScriptExecutionDisabled", { value: true });
    const size = { width: 360, height: 740, deviceScaleFactor: 1, mobile: true };
    await send("Emulation.setDeviceMetricsOverride", size);
    await send("Page.navigate", { url: page.href });

    const label = "document.activeElement?.labels?.[0]?.textContent";
    await look(label, (text) => text === "Email address");
    const offered = "[...document.activeElement.list.options].map(({ value }) => value).join(' ')";
    await look(offered, (emails) => emails === `${ALICE.email} ${BOB.email}`);
    await look("document.documentElement.scrollWidth", (width) => width === 360);
    await look("parseFloat(getComputedStyle(document.activeElement).outlineWidth)", (width) => Number(width) >= 2);
    const heights = "Math.min(...[...document.querySelectorAll('input, button')].map((one) => one.offsetHeight))";
    await look(heights, (height) => Number(height) >= 44); // for a thumb
    await type("eve@example.com");
    await look("document.querySelector('[role=alert]')?.textContent", (text) => text === "Wrong email");
    await look(label, (text) => text === "Email address");
    const [[{ url }]] = await Promise.all([once(callback, "request"), type(ALICE.email)]);
    assert.match(url, /^\/callback\?code=\w+$/);
  },
);

/** Starts Chromium with one empty page, over its pipe: Node 20 has no WebSocket. */
async function openBrowser(t: TestContext) {
  const profile = await mkdtemp(join(tmpdir(), "sign-in-page-"));
  const browser = spawn(CHROMIUM || "chromium", [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    `--user-data-dir=${profile}`,
    "--remote-debugging-pipe",
  ], { stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"] });
  const exited = once(browser, "exit");
  t.after(async () => {
    browser.kill("SIGKILL");
    await exited;
    await rm(profile, { recursive: true, force: true, maxRetries: 5 });
  });
  const [, , , input, output] = browser.stdio;
  assert.ok(input instanceof Writable && output instanceof Readable);

  const waiting = new Map<number, (result: Record<string, unknown>) => void>();
  let unread = "";
  output.setEncoding("utf8").on("data", (chunk: string) => {
    const messages = (unread + chunk).split("\0");
    unread = messages.pop() ?? "";
    for (const { id, result, error } of messages.map((message) => JSON.parse(message))) {
      waiting.get(id)?.(result ?? error);
    }
  });
  const command = (method: string, params: Record<string, unknown>, sessionId?: unknown) =>
    new Promise<Record<string, unknown>>((resolve) => {
      const id = waiting.size + 1;
      waiting.set(id, resolve);
      input.write(`${JSON.stringify({ id, method, params, sessionId })}\0`);
    });
  const { targetId } = await command("Target.createTarget", { url: "about:blank" });
  const { sessionId } = await command("Target.attachToTarget", { targetId, flatten: true });
  const send = (method: string, params: Record<string, unknown>) => command(method, params, sessionId);

  /** Evaluates until the value is right: a page needs a moment to load. */
  async function look(expression: string, isRight: (value: unknown) => boolean): Promise<void> {
    const deadline = Date.now() + 10_000;
    let value: unknown;
    do {
      const { result } = await send("Runtime.evaluate", { expression, returnByValue: true });
      value = (result as { value?: unknown } | undefined)?.value;
    } while (!isRight(value) && Date.now() < deadline);
    assert.ok(isRight(value), `${expression} is ${value}`);
  }
  return { send, look };
}
