/** Runs the doctor inside the test's process, and reads its report. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { createServer as createHttpServer } from "node:http";
import type { IncomingMessage, ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { text } from "node:stream/consumers";
import type { TestContext } from "node:test";
import { createServer } from "../../../server.ts";
import { doctor } from "./doctor.ts";
import type { Options } from "./doctor.ts";
import { startServer } from "../../support/server.ts";
import { ALICE, configuredTenant, signIn, startTenant } from "../../support/tenant.ts";
import type { TenantKind } from "../../support/tenant.ts";

const README = readFileSync(new URL("../../../README.md", import.meta.url), "utf8");

export type Environment = Record<string, string>;
/** Shows the user a page, and returns where the browser is sent from there. */
export type Browser = (authorizeUrl: string) => Promise<URL>;

export interface Report {
  status: number;
  output: string;
  /** Of each check: its status, its step, and all that is said of it, in one line. */
  checks: { status: string; step: number; said: string }[];
}

const asAlice: Browser = (url) => signIn(url, ALICE);

/** Signs in where the doctor asks for that. Every heading it names must be in the README. */
export async function runDoctor(env: Environment, options: Options = {}, browser: Browser = asAlice): Promise<Report> {
  let output = "";
  const status = await doctor(env, options, (text) => output += `${text}\n`, async (url) => {
    await fetch(await browser(url));
  });
  const checks = [...output.matchAll(/^(ok|missing|cannot tell) +Step (\d) {2}(.*(?:\n {21}.*)*)/gm)];
  for (const [, heading = ""] of output.matchAll(/README, "(.*)"/g)) {
    assert.match(README, new RegExp(`^#+ ${heading.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}`, "m"));
  }
  return {
    status,
    output,
    checks: checks.map(([, status = "", step, said = ""]) => ({
      status,
      step: Number(step),
      said: said.replace(/\n +/g, " "),
    })),
  };
}

export function environment(tenant: string, serverUrl: string): Environment {
  return {
    AUTH0_DOMAIN: tenant,
    MCP_SERVER_URL: serverUrl,
    AUTH0_CLIENT_ID: "machine",
    AUTH0_CLIENT_SECRET: "machine-secret",
  };
}

/** The server, and a tenant that is configured for it as the README says. */
export async function start(t: TestContext, serverEnv: Environment = {}, create?: typeof createServer) {
  const tenant = await startTenant();
  t.after(() => tenant.close());
  const server = await startServer({ AUTH0_DOMAIN: tenant.origin, ...serverEnv }, undefined, create);
  t.after(() => server.close());
  Object.assign(tenant.settings, configuredTenant("permissive", server.url));
  return { tenant, url: server.url, env: environment(tenant.origin, server.url) };
}

/** Answers a request in the place of another, and says whether it has. */
export type Intercept = (request: IncomingMessage, response: ServerResponse, body: string) => boolean;

/** The same behind a tunnel that answers some requests by itself. */
export function startBehindTunnel(t: TestContext, intercept: Intercept) {
  return start(t, {}, (settings, store) => {
    const server = createServer(settings, store);
    return createHttpServer((request, response) => {
      if (!intercept(request, response, "")) server.emit("request", request, response);
    });
  });
}

/** The same where the tenant answers some requests otherwise than the stand-in does. */
export async function startWithTenantThat(
  t: TestContext,
  { kind = "permissive", intercept = () => false, rewrite = (body) => body }: {
    kind?: TenantKind;
    intercept?: Intercept;
    /** Changes the headers in place, and returns the body. */
    rewrite?: (body: string, headers: Headers) => string;
  },
) {
  const tenant = await startTenant();
  t.after(() => tenant.close());
  const inner = tenant.origin;
  const front = createHttpServer(async (request, response) => {
    const body = await text(request);
    if (intercept(request, response, body)) return;
    const { method = "", headers, url = "" } = request;
    const reply = await fetch(inner + url, {
      method,
      redirect: "manual",
      headers: { "content-type": headers["content-type"] ?? "" },
      ...(method === "POST" && { body }),
    });
    const sent = new Headers(reply.headers);
    const rewritten = rewrite(await reply.text(), sent);
    response.writeHead(reply.status, Object.fromEntries(sent)).end(rewritten);
  });
  await once(front.listen(0, "127.0.0.1"), "listening");
  t.after(() => {
    front.close();
    front.closeAllConnections();
  });
  const origin = `http://localhost:${(front.address() as AddressInfo).port}`;
  Object.defineProperty(tenant, "origin", { value: origin }); // it is the issuer, too
  const server = await startServer({ AUTH0_DOMAIN: origin });
  t.after(() => server.close());
  Object.assign(tenant.settings, configuredTenant(kind, server.url));
  return { tenant, env: environment(origin, server.url) };
}

export function sendPage(response: ServerResponse, status: number, html: string, headers: Environment = {}): true {
  response.writeHead(status, { "content-type": "text/html", ...headers }).end(html);
  return true;
}

/** Asserts what is missing, step and words, in order and nothing else, and what the exit status says of it. */
export function assertMissing(
  { status, output, checks }: Report,
  ...expected: [step: number, said: RegExp][]
): void {
  const missing = checks.filter((check) => check.status === "missing");
  assert.deepEqual(missing.map(({ step }) => step), expected.map(([step]) => step), output);
  for (const [index, [, said]] of expected.entries()) assert.match(missing[index]?.said ?? "", said);
  const [first] = expected;
  assert.equal(status, first === undefined ? 0 : 1, output);
  const summary = first && `${expected.length} missing: start with Step ${first[0]}.`;
  assert.match(output, new RegExp(`\n${summary ?? "Nothing is missing, as far as was checked."}\n$`));
}

/** What is said of the one check that says this. */
export function statusOf({ checks, output }: Report, said: RegExp): string {
  const found = checks.filter((check) => said.test(check.said));
  assert.equal(found.length, 1, `${said} in ${output}`);
  return found[0]?.status ?? "";
}
