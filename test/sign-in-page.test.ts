/** The stand-in tenant's sign-in page in a real browser, on a phone's width and without script. */
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
import { ALICE, BOB, configuredTenant, OIDC_SCOPES, startTenant } from "./support/tenant.ts";

const CHROMIUM = (process.env.PATH ?? "").split(delimiter).map((directory) => join(directory, "chromium"))
  .find((path) => existsSync(path)) ?? "";
const skip = !CHROMIUM && process.env.REQUIRE_CHROMIUM !== "1" && "there is no chromium in PATH";

test(
  "a person signs in on a phone's width, by keyboard and without script",
  { skip, timeout: 60_000 },
  async (t) => {
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
    await look(
      "parseFloat(getComputedStyle(document.activeElement).outlineWidth)",
      (width) => Number(width) >= 2,
    );
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
