/** Runs the doctor inside the test's process, and reads its report. */
import assert from "node:assert/strict";
import { createServer as createHttpServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { TestContext } from "node:test";
import { createServer } from "../../../server.ts";
import { doctor, type Options } from "./doctor.ts";
import { readTemplate, startServer } from "../../support/server.ts";
import { ALICE, configuredTenant, signIn, startTenant } from "../../support/tenant.ts";

const README = readTemplate("README.md");

export type Environment = Record<string, string>;
/** Shows the user a page, and returns where the browser is sent from there. */
export type Browser = (authorizeUrl: string) => Promise<URL>;

export interface Report {
  status: number;
  output: string;
  /** Of each check: its status, its step, and all that is said of it, in one line. */
  checks: { status: string; step: string; said: string }[];
}

/** Runs the doctor, and checks that what it names is a heading of the README or in a row of a table. */
export async function runDoctor(
  env: Environment,
  options: Options = {},
  browser: Browser = (url) => signIn(url, ALICE),
): Promise<Report> {
  let output = "";
  const status = await doctor(env, options, (text) => output += `${text}\n`, async (url) => {
    await fetch(await browser(url));
  });
  const checks = [...output.matchAll(/^(ok|missing|cannot tell) +Step (\w+) +(.*(?:\n {21}.*)*)/gm)];
  for (const [, heading = ""] of output.matchAll(/README, "(.*)"/g)) {
    assert.match(README, new RegExp(`^(#+ |\\| .*)${heading.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}`, "m"));
  }
  return {
    status,
    output,
    checks: checks.map(([, status = "", step = "", said = ""]) => ({ status, step, said: said.replace(/\n +/g, " ") })),
  };
}

const MACHINE = { AUTH0_CLIENT_ID: "machine", AUTH0_CLIENT_SECRET: "machine-secret" };

export function environment(tenant: string, serverUrl: string): Environment {
  return { AUTH0_DOMAIN: tenant, MCP_SERVER_URL: serverUrl, ...MACHINE };
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

/** The same behind a tunnel, where `intercept` may answer a request itself and then gives true. */
export function startBehindTunnel(
  t: TestContext,
  intercept: (request: IncomingMessage, response: ServerResponse) => boolean,
) {
  return start(t, {}, (settings, store) => {
    const server = createServer(settings, store);
    return createHttpServer((request, response) => {
      if (!intercept(request, response)) server.emit("request", request, response);
    });
  });
}

export function sendPage(response: ServerResponse, status: number, html: string, headers: Environment = {}): true {
  response.writeHead(status, { "content-type": "text/html", ...headers }).end(html);
  return true;
}

/** Asserts what is missing, as step and text, in order and nothing else, and the exit status and summary. */
export function assertMissing({ status, output, checks }: Report, ...expected: RegExp[]): void {
  const missing = checks.filter((check) => check.status === "missing");
  assert.equal(missing.length, expected.length, output);
  for (const [index, { step, said }] of missing.entries()) assert.match(`${step} ${said}`, expected[index] ?? /^$/);
  const [first] = missing;
  assert.equal(status, first === undefined ? 0 : 1, output);
  const summary = first && `${expected.length} missing: start with Step ${first.step}.`;
  assert.match(output, new RegExp(`\n${summary ?? "Nothing is missing, as far as was checked."}\n(Not tried: .*\n)?$`));
}

/** The status of the one check whose text matches. */
export function statusOf({ checks, output }: Report, said: RegExp): string {
  const found = checks.filter((check) => said.test(check.said));
  assert.equal(found.length, 1, `${said} in ${output}`);
  return found[0]?.status ?? "";
}
