/** `npm run dev`, and the sign-in page of the stand-in tenant in a real browser. */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { Readable, Writable } from "node:stream";
import { test, type TestContext } from "node:test";
import { dev } from "./run/dev.ts";
import { connect, Provider } from "./support/sdk-client.ts";
import { freePort, post, runCommandLine, until } from "./support/server.ts";
import { ALICE, configuredTenant, OIDC_SCOPES, startTenant, TENANT_KINDS } from "./support/tenant.ts";

const environment = async () => ({
  PORT: String(await freePort()),
  TENANT_PORT: String(await freePort()),
  LOG_LEVEL: "silent",
});

/** The value of `name` among the lines for `.env`. */
function printed(name: string, output: string): string {
  return new RegExp(`^ +${name}=(.+)$`, "m").exec(output)?.[1] ?? assert.fail(`${name} is not in ${output}`);
}

for (const kind of TENANT_KINDS) {
  test(`the SDK's client signs in with what npm run dev prints for a ${kind} tenant`, async (t) => {
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
    assert.match(output, /paste the server's URL:\n {2}npx @modelcontextprotocol\/inspector\n/);

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

test("npm run dev runs until a signal, and then ends with status 0", async () => {
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    const { child, outcome } = runCommandLine("dev", [], { env: await environment() });
    const [line] = await once(child.stdout, "data");
    assert.match(String(line), /^The server is http:\/\/localhost:\d+\/mcp: /);
    assert.ok(child.pid);
    process.kill(child.pid, signal); // not child.kill: Deno would then report the signal in place of the status
    assert.equal((await outcome).status, 0);
  }
});

test("npm run dev says in one line which port is in use, and ends with status 1", async (t) => {
  const taken = createServer().listen(0, "127.0.0.1");
  t.after(() => taken.close());
  await once(taken, "listening");
  const { port } = taken.address() as AddressInfo;
  const free = String(await freePort());
  const line = `Port ${port} is in use: set PORT (the server's) or TENANT_PORT (the tenant's) to another\n`;
  for (const env of [{ PORT: String(port), TENANT_PORT: free }, { PORT: free, TENANT_PORT: String(port) }]) {
    const { status, stderr } = await runCommandLine("dev", [], { env }).outcome;
    assert.deepEqual([status, stderr], [1, line]);
  }
});

test("npm run dev refuses an unknown argument or tenant, and --help names every option", async () => {
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

const title = "the sign-in page works at a phone's width, by keyboard, and without scripts";
test(title, { skip, timeout: 60_000 }, async (t) => {
  const callback = createServer((_, response) => response.end("Signed in")).listen(0, "127.0.0.1");
  t.after(() => callback.close());
  t.after(() => callback.closeAllConnections());
  await once(callback, "listening");
  const redirect_uri = `http://localhost:${(callback.address() as AddressInfo).port}/callback`;
  const settings = configuredTenant("permissive", "http://localhost:1/mcp", "fixed");
  for (const application of settings.applications) application.callbackUrls = [redirect_uri];
  const tenant = await startTenant(settings);
  t.after(() => tenant.close());
  const page = new URL(`${tenant.origin}/authorize`);
  const request = { response_type: "code", client_id: "fixed", redirect_uri, scope: OIDC_SCOPES.join(" ") };
  page.search = new URLSearchParams(request).toString();

  const send = await openBrowser(t);
  await send("Emulation.setScriptExecutionDisabled", { value: true });
  const size = { width: 360, height: 740, deviceScaleFactor: 1, mobile: true };
  await send("Emulation.setDeviceMetricsOverride", size);
  await send("Page.navigate", { url: page.href });
  // Not before all of it is there: Enter submits the form with its first button, if it has one yet.
  const expression = "document.readyState === 'complete' && document.activeElement?.labels?.[0]?.textContent";
  await until(async () => {
    const { result } = await send("Runtime.evaluate", { expression });
    return (result as { value?: unknown } | undefined)?.value === "Email address";
  }, "the page asks for the e-mail address");
  await send("Input.insertText", { text: ALICE.email });
  const enter = { key: "Enter", text: "\r", windowsVirtualKeyCode: 13 };
  const [[{ url }]] = await Promise.all([
    once(callback, "request"),
    send("Input.dispatchKeyEvent", { type: "keyDown", ...enter }),
  ]);
  assert.match(url, /^\/callback\?code=\w+&iss=/);
});

/** Starts Chromium with one empty page, over its pipe: Node 20 has no WebSocket. */
async function openBrowser(t: TestContext) {
  const profile = await mkdtemp(join(tmpdir(), "sign-in-page-"));
  const flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking " +
    `--disable-component-update --disable-sync --remote-debugging-pipe --user-data-dir=${profile}`;
  const stdio = ["ignore", "ignore", "ignore", "pipe", "pipe"] as const;
  const browser = spawn(CHROMIUM || "chromium", flags.split(" "), { stdio: [...stdio] });
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
  return (method: string, params: Record<string, unknown>) => command(method, params, sessionId);
}
