/**
 * `npm run demo`: the whole sign-in and the first tasks, offline, over real HTTP with real tokens.
 *
 * In front of the real `server.ts` stands the tenant of `tenant.ts`, and the client of `chatgpt.ts` links it for two
 * users, hop by hop; the numbers are those of the README's diagram.
 *
 * `--break SETTING` leaves one setting of the guide out. What then happens is compared with what is expected:
 * exit status 0 only where they agree.
 */
import assert from "node:assert/strict";
import http from "node:http";
import { parseArgs, styleText } from "node:util";
import { isMain } from "./command.ts";
import { createServer } from "../../server.ts";
import { Connector, type Hop, publishClientMetadata } from "../support/chatgpt.ts";
import { freePort, startServer } from "../support/server.ts";
import {
  ALICE,
  BOB,
  configuredTenant,
  FIXED_CALLBACK_ID,
  FIXED_CLIENT,
  isStrict,
  signIn,
  startTenant,
} from "../support/tenant.ts";
import type { Tenant, TenantKind, User, Way } from "../support/tenant.ts";

type Print = (line: string) => void;

/** All that a setting of the guide can be a part of, before the demo runs. */
interface Setup {
  tenant: Tenant;
  /** Environment of the server. */
  environment: { AUTH0_DOMAIN: string; MCP_SERVER_URL: string; ENFORCE_SCOPES?: string };
  /** Makes the server, and whatever stands in front of it. */
  createServer: typeof createServer;
  /** "OIDC enabled" in ChatGPT's form. */
  oidcEnabled: boolean;
}

interface Break {
  about: string;
  /** The step of the README that mends it. */
  step: string;
  /** The kinds of tenant on which the setting counts. */
  kinds: readonly TenantKind[];
  /** How ChatGPT becomes a client, where it does not register itself. */
  way?: Way;
  leaveOut: (setup: Setup) => void;
  symptom: RegExp;
}

const STEP_0 = "Step 0. Run the server behind a public URL";
const STEP_1 = "Step 1. Create an API";
const STEP_2 = "Step 2. Configure Default Audience";
const REGISTRATION = "Enable client registration";
const STEP_5 = "Step 5. Configure Callback URLs (optional)";

const BREAKS: Record<string, Break> = {
  "registration": {
    about: "Dynamic Client Registration is off, as in a new tenant",
    step: REGISTRATION,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant: { settings } }) => settings.dynamicClientRegistration = false,
    symptom: /Dynamic client registration is disabled/,
  },
  "application-limit": {
    about: "failed attempts have filled the tenant with applications",
    step: REGISTRATION,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant: { settings } }) => settings.applicationLimit = settings.applications.length,
    symptom: /You reached the limit of entities of this type for this tenant/,
  },
  "default-audience": {
    about: "the tenant has no Default Audience",
    step: STEP_2,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant: { settings } }) => settings.defaultAudience = "",
    symptom: /^401 .*invalid_token.*JWE of 5 parts/,
  },
  "api-identifier": {
    about: "the API Identifier ends in a slash, MCP_SERVER_URL does not",
    step: STEP_1,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant: { settings } }) => settings.apis.forEach((api) => api.identifier += "/"),
    symptom: /Oops!.*Service not found: http/,
  },
  "offline-access": {
    about: "Allow Offline Access is off for the API",
    step: `${STEP_1}, API Settings`,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant: { settings } }) => settings.apis.forEach((api) => api.allowOfflineAccess = false),
    symptom: /No refresh token|OAUTH_SCOPES_MISMATCH.*offline_access/, // the latter where no Action adds the scope
  },
  "connection": {
    about: "the connection is not promoted to domain level",
    step: "Step 3. Enable a Connection for Third-Party Apps",
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant: { settings } }) =>
      settings.connections.forEach((connection) => connection.domainLevel = false),
    symptom: /Oops!.*no connections enabled for the client/,
  },
  "action": {
    about: "the post-login Action is not in the flow",
    step: "Step 4. Create Post-Login Action",
    kinds: ["permissive"],
    leaveOut: ({ tenant: { settings } }) => settings.postLoginAction = false,
    symptom: /OAUTH_SCOPES_MISMATCH.*Not all requested permissions were granted/,
  },
  "default-permissions": {
    about: "the API has no Default Permissions for third-party applications",
    step: `${STEP_1}, API Settings`,
    kinds: ["strict"],
    leaveOut: ({ tenant: { settings } }) =>
      settings.apis.forEach((api) => delete api.defaultPermissionsForThirdPartyApplications),
    symptom: /Oops!.*Client "tpc_\w+" is not authorized to access resource server "http/,
  },
  "oidc": {
    about: "OIDC enabled is left ticked in ChatGPT",
    step: "Step 7. Connect ChatGPT",
    kinds: ["strict"],
    leaveOut: (setup) => setup.oidcEnabled = true,
    symptom: /OAUTH_OWNER_PROFILE_ID_MISSING/,
  },
  "cimd-import": {
    about: "the tenant takes client metadata documents, but ChatGPT's is not imported",
    step: REGISTRATION,
    kinds: ["permissive", "strict"],
    way: "cimd",
    leaveOut: ({ tenant: { settings } }) => settings.applications = [],
    symptom: /Oops!.*invalid_request: Unknown client: http.*client\.json/,
  },
  "issuer-response": {
    about: "the tenant promises iss with every answer, and does not send it",
    step: REGISTRATION,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant }) => {
      tenant.settings.includeIssuerInAuthorizationResponses = true;
      tenant.withholdsIssuer = true;
    },
    symptom: /The authorization response has the iss \(none\), expected http/,
  },
  "callback": {
    about: "the fixed application does not know ChatGPT's callback URL",
    step: STEP_5,
    kinds: ["permissive", "strict"],
    way: "fixed",
    leaveOut: ({ tenant: { settings } }) => settings.applications.forEach((one) => one.callbackUrls = []),
    symptom: /Oops!.*Callback URL mismatch: https:\/\/chatgpt\.com\/connector/,
  },
  "rotation": {
    about: "refresh tokens rotate without an overlap period, and ChatGPT refreshes twice at once",
    step: STEP_5,
    kinds: ["permissive", "strict"],
    way: "fixed",
    leaveOut: ({ tenant: { settings } }) => settings.applications.forEach((one) => one.rotationOverlap = 0),
    symptom: /Unknown or invalid refresh token/,
  },
  "bot-rule": {
    about: "a bot rule in front of the server turns ChatGPT away, though a browser and curl get through",
    step: STEP_0,
    kinds: ["permissive", "strict"],
    leaveOut: (setup) => setup.createServer = createServerBehindBotRule,
    symptom: /Expected 401, got 403/,
  },
  "server-url": {
    about: "MCP_SERVER_URL is not the API Identifier: the URL has changed, the tenant has not",
    step: STEP_0,
    kinds: ["permissive", "strict"],
    leaveOut: ({ environment }) => environment.MCP_SERVER_URL += "/v2",
    symptom: /^401 .*invalid_token.*audience.*expected http\S+\/v2/,
  },
  "issuer": {
    about: "AUTH0_DOMAIN is another domain of the same tenant",
    step: STEP_0,
    kinds: ["permissive", "strict"],
    leaveOut: ({ environment, tenant }) => environment.AUTH0_DOMAIN = tenant.origin.replace("localhost", "127.0.0.1"),
    symptom: /^401 .*invalid_token.*issuer http:\/\/localhost\S+ expected http:\/\/127\.0\.0\.1/,
  },
  "signing-keys": {
    about: "the server cannot fetch the tenant's signing keys",
    step: STEP_0,
    kinds: ["permissive", "strict"],
    leaveOut: ({ tenant }) => tenant.answerJwks = (response) => response.writeHead(500).end(),
    symptom: /^503 .*signing keys cannot be had/,
  },
  "permissions": {
    about: "ENFORCE_SCOPES is on, RBAC too, and the users have no role",
    step: "Make it yours, Permissions per tool",
    kinds: ["permissive"],
    leaveOut: ({ environment, tenant: { settings } }) => {
      environment.ENFORCE_SCOPES = "true";
      settings.apis.forEach((api) => api.enableRbac = true);
    },
    symptom: /^Tool error: Bearer .*insufficient_scope.*tasks:write/,
  },
};

/** As Cloudflare's "Block AI bots" or Bot Fight Mode may do. */
function createServerBehindBotRule(...parameters: Parameters<typeof createServer>): http.Server {
  const server = createServer(...parameters);
  return http.createServer((request, response) => {
    if (/openai-mcp|aiohttp/i.test(request.headers["user-agent"] ?? "")) response.writeHead(403).end();
    else server.emit("request", request, response);
  });
}

const HELP = `npm run demo
  The whole sign-in and the first tasks, offline: the real server, a stand-in for Auth0 and one for ChatGPT.
  Prints each hop between them, and exits 0.

npm run demo -- OPTIONS
  --tenant KIND    permissive (the default) or strict: README, "Which way is yours"
  --break SETTING  leaves one setting of the guide out, and shows what a user then sees and the step that mends it;
                   exits 0 where that is what was expected, 1 otherwise. --break alone lists the settings
  --help           this text`;

/**
 * Runs the demo.
 *
 * @param args What stands after `npm run demo --`.
 * @param print Takes a line, or several.
 * @param printError The same for what was wrong with `args` or went wrong unexpectedly.
 * @returns The exit status.
 */
export async function demo(args: string[], print: Print, printError: Print = print): Promise<number> {
  // Not strict, since --break may stand alone.
  const { values, positionals } = parseArgs({
    args,
    options: { tenant: { type: "string" }, break: { type: "string" }, help: { type: "boolean" } },
    strict: false,
  });
  const refuse = (line: string) => {
    printError(line);
    return 1;
  };
  const unknown = [
    ...positionals,
    ...Object.keys(values).filter((name) => !["tenant", "break", "help"].includes(name)),
  ];
  if (unknown.length > 0) {
    return refuse(`Unknown argument: ${unknown.join(" ")}. --help lists the known ones`);
  }
  if (values.help) {
    print(HELP);
    return 0;
  }

  const { break: setting } = values;
  if (setting === true || setting === "") {
    listBreaks(print);
    return 0;
  }
  const broken = Object.hasOwn(BREAKS, String(setting)) ? BREAKS[String(setting)] : undefined;
  if (setting !== undefined && !broken) {
    listBreaks(print);
    return refuse(`Unknown setting: ${setting}. The known ones are above`);
  }
  const kind = values.tenant ?? broken?.kinds[0] ?? "permissive";
  if (kind !== "permissive" && kind !== "strict") return refuse("--tenant must be permissive or strict");
  if (broken && !broken.kinds.includes(kind)) {
    return refuse(`--break ${setting} is about a ${broken.kinds[0]} tenant: leave --tenant ${kind} out`);
  }
  return await demonstrate(kind, broken, print, printError);
}

function listBreaks(print: Print): void {
  print("Settings that can be left out, npm run demo -- --break SETTING:");
  for (const [name, { about, kinds }] of Object.entries(BREAKS)) {
    print(`  ${name.padEnd(20)}${about}${kinds.length === 1 ? ` (${kinds[0]} tenant)` : ""}`);
  }
}

/** Sets everything up as the guide says, but for what is to be left out, and runs it. */
async function demonstrate(
  kind: TenantKind,
  broken: Break | undefined,
  print: Print,
  printError: Print,
): Promise<number> {
  const way = broken?.way ?? "register";
  const tenant = await startTenant({ kind });
  const clientDocuments = way === "cimd" ? await publishClientMetadata() : undefined;
  const mcpServerUrl = `http://localhost:${await freePort()}/mcp`;
  Object.assign(tenant.settings, configuredTenant(kind, mcpServerUrl, way));
  const setup: Setup = {
    tenant,
    environment: { AUTH0_DOMAIN: tenant.origin, MCP_SERVER_URL: mcpServerUrl },
    createServer,
    oidcEnabled: !isStrict({ tenant: kind, way }),
  };
  broken?.leaveOut(setup);
  const server = await startServer(setup.environment, undefined, setup.createServer);
  try {
    print(`Tenant   ${tenant.issuer} (stand-in, ${kind})`);
    print(`Server   ${server.url}`);
    if (broken) print(`Left out ${broken.about}`);
    const connectorOf = (user: User, fromHop: number) =>
      new Connector({
        mcpServerUrl: server.url,
        browser: (authorizeUrl) => signIn(authorizeUrl, user),
        oidcEnabled: setup.oidcEnabled,
        ...(clientDocuments && { clientDocuments }),
        ...(way === "fixed" && { fixedClient: FIXED_CLIENT, callbackId: FIXED_CALLBACK_ID }),
        observe: (hop) => hop.number >= fromHop && printHop(hop, print),
      });
    // An application made by hand can be prepared for a client that refreshes twice at once.
    const refreshes = way === "fixed" ? 2 : 1;
    const failure = await useTheTools(connectorOf, refreshes, print).then(() => undefined, (error: unknown) => error);
    if (broken) return explain(broken, failure, tenant, print);
    if (failure === undefined) return summarize(print);
    printError(String(failure instanceof Error ? failure.stack : failure));
    return 1;
  } finally {
    await server.close();
    await clientDocuments?.close();
    await tenant.close();
  }
}

/** Two users link the server and keep a task each. Throws what a user would be stopped by. */
async function useTheTools(
  connectorOf: (user: User, fromHop: number) => Connector,
  refreshes: number,
  print: Print,
): Promise<void> {
  const alice = connectorOf(ALICE, 1);
  const bob = connectorOf(BOB, 5);
  try {
    heading("Alice links the server", print);
    await alice.link();
    await createTask(alice, "Buy oat milk");

    heading("Bob links it too (hops 1 to 4 as before)", print);
    await bob.link();
    await createTask(bob, "Water the plants");

    heading("Each lists the tasks", print);
    assert.deepEqual(await listTitles(alice), ["Buy oat milk"]);
    assert.deepEqual(await listTitles(bob), ["Water the plants"]);
    assert.notEqual(alice.profile.id, bob.profile.id);

    heading("Alice's access token is about to expire", print);
    const { refresh_token: used } = alice.tokens;
    const outcomes = await Promise.allSettled(Array.from({ length: refreshes }, () => alice.refresh()));
    for (const outcome of outcomes) if (outcome.status === "rejected") throw outcome.reason;
    assert.ok(alice.tokens.refresh_token !== used, "The refresh token was not rotated");
    assert.deepEqual(await listTitles(alice), ["Buy oat milk"]);
  } finally {
    await alice.close();
    await bob.close();
  }
}

async function createTask(connector: Connector, title: string): Promise<void> {
  const { isError, content, _meta } = await connector.callTool("create_task", { title });
  if (isError) throw new Error(`Tool error: ${_meta?.["mcp/www_authenticate"] ?? JSON.stringify(content)}`);
}

async function listTitles(connector: Connector): Promise<unknown[]> {
  const { structuredContent } = await connector.callTool("list_tasks");
  const { tasks } = structuredContent as { tasks: { title: string }[] };
  return tasks.map(({ title }) => title);
}

const isColoured = process.stdout.isTTY && !process.env.NO_COLOR;
const paint = (format: Parameters<typeof styleText>[0], text: string) => isColoured ? styleText(format, text) : text;

function heading(text: string, print: Print): void {
  print(`\n${paint("bold", text)}`);
}

function printHop({ number, title, asked, answered, failed }: Hop, print: Print): void {
  const mark = failed ? paint("red", "failed  ") : paint("green", "answered");
  print(`  ${number} ${title}\n      asked    ${asked}\n      ${mark} ${answered}`);
}

function summarize(print: Print): number {
  heading("Summary", print);
  print(
    "  Two users signed in, each sees only their own tasks, and a refreshed token goes on working.\n" +
      "  The tenant and ChatGPT were stand-ins; the server was server.ts as it stands.",
  );
  return 0;
}

function explain({ step, symptom }: Break, failure: unknown, tenant: Tenant, print: Print): number {
  const seen = failure instanceof Error ? failure.message : "nothing failed";
  const logged = tenant.logs.findLast(({ type }) => type === "f")?.description;
  const isExpected = symptom.test(seen);
  heading("What the user sees", print);
  print(`  Symptom     ${seen}`);
  if (logged) print(`  Auth0's log ${logged}`);
  print(`  Mended by   README, ${step}`);
  print(
    isExpected ? "  As expected when this setting is left out." : paint("red", `  NOT as expected: ${symptom}`),
  );
  return isExpected ? 0 : 1;
}

if (isMain(import.meta.url)) {
  // A reader that stops early, such as `| head`, must not end this process with a stack trace.
  process.stdout.on("error", () => {});
  process.exitCode = await demo(process.argv.slice(2), console.log, console.error);
}
